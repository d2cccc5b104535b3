"""Geometry of the gradient chart: exponents of FP32 gradients in, SVG coordinates out.

x is the binary logarithm of a gradient's magnitude, y the share of the nonzero gradients between
two powers of two, one bar for those of weights and one for those of activations. FP16's borders
stand at 2**-24, under which it has nothing, 2**-14, under which it loses digits, and 2**16, which
is infinite. A loss scale of 2**k moves every gradient k to the right; drawn in is the same thing
seen from the gradients: the borders k to the left. One ruler a scale says what lies between them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from amp_convert.core.exponent_histogram import SMALLEST_NORMAL, TINIEST, ExponentHistogram, log2
from amp_convert.report import text as fmt
from amp_convert.report.charts.svg import LEFT, RIGHT, TOP, Axis, Mark, round_numbers
from amp_convert.validate.training.gradient_results import GradientParity

BOTTOM, RULER = 214, 22
_OVERFLOW = 16  # FP16's largest number is just under 2**16
_EXPONENTS = (-150, 128)  # those of FP32; what an FP64 model has beyond is counted at the ends
_CHARACTER = 6.6


@dataclass(frozen=True)
class Zone:
    """What becomes of gradients between two exponents: lost, subnormal, kept or overflow."""

    kind: str
    x: float
    width: float
    label: str


@dataclass(frozen=True)
class Ruler:
    """The zones of FP16, and where the borders between them lie, at one loss scale."""

    title: str
    y: float
    zones: tuple[Zone, ...]
    borders: tuple[float, ...]


@dataclass(frozen=True)
class GradientChart:
    """The histogram of exponents, in SVG user units; `weights` and `activations` are path data."""

    shares: tuple[Mark, ...]
    powers: tuple[Mark, ...]
    weights: str
    activations: str
    rulers: tuple[Ruler, ...]


def gradient_chart(gradients: GradientParity) -> GradientChart | None:
    """The histograms of weight and activation gradients; None when all gradients are zero."""
    weights, activations = (
        _shares(part.histogram) for part in (gradients.weight_range, gradients.activation_range)
    )
    found = [*weights, *activations]
    if not found:
        return None
    scale = log2(gradients.scale)
    lowest = max(min(*found, TINIEST - scale) - 2, _EXPONENTS[0])
    highest = min(max(*found, _OVERFLOW) + 3, _EXPONENTS[1])
    x = Axis(lowest, highest, LEFT, RIGHT)
    shares = round_numbers(0, max((*weights.values(), *activations.values())), 4)
    y = Axis(0, shares[-1], BOTTOM, TOP)
    powers = [n for n in round_numbers(lowest, highest, 12, least=1) if lowest <= n <= highest]
    titles = {power: f"× {fmt.power_of_two(power) if power else 1}" for power in (0, scale)}
    return GradientChart(
        shares=tuple(Mark(LEFT, y.at(share), f"{100 * share:g} %") for share in shares),
        powers=tuple(Mark(x.at(n), 0, fmt.power_of_two(int(n))) for n in powers),
        weights=_bars(weights, x, y, 0.08),
        activations=_bars(activations, x, y, 0.5),
        rulers=tuple(
            _ruler(title, power, x, BOTTOM + 30 + row * (RULER + 6))
            for row, (power, title) in enumerate(titles.items())
        ),
    )


def _shares(histogram: ExponentHistogram) -> dict[int, float]:
    """The share of each exponent among the nonzero, finite gradients."""
    low, high = _EXPONENTS
    total = sum(histogram.counts.values())
    shares: dict[int, float] = {}
    for exponent, count in histogram.counts.items():
        place = min(max(exponent, low), high - 1)
        shares[place] = shares.get(place, 0.0) + count / total
    return shares


def _bars(shares: dict[int, float], x: Axis, y: Axis, begin: float) -> str:
    """Path data of bars that are 0.42 of an exponent wide; a share that is not 0 is seen."""
    parts = []
    for exponent, share in sorted(shares.items()):
        left, right = x.at(exponent + begin), x.at(exponent + begin + 0.42)
        top = min(y.at(share), y.start - 1.5)
        parts.append(f"M{left:g} {y.start:g}V{top:g}H{right:g}V{y.start:g}Z")
    return "".join(parts)


def _ruler(title: str, power: int, x: Axis, y: float) -> Ruler:
    borders = [x.at(limit - power) for limit in (TINIEST, SMALLEST_NORMAL, _OVERFLOW)]
    kinds = (
        ("lost", "underflow"),
        ("subnormal", "fewer digits"),
        ("kept", "float16 keeps its digits"),
        ("overflow", "overflow"),
    )
    edges = [LEFT, *borders, RIGHT]
    zones = []
    for (kind, label), (left, right) in zip(kinds, itertools.pairwise(edges), strict=True):
        if (width := round(right - left, 1)) > 0:
            fits = len(label) * _CHARACTER < width
            zones.append(Zone(kind, left, width, label if fits else ""))
    return Ruler(title, y, tuple(zones), tuple(borders))
