"""Geometry of the training charts: what training showed in, SVG coordinates out.

1. `loss_chart`: the loss of each arm over the steps, in the band of FP32's own noise: the largest
   difference so far between FP32 and FP32 nudged by one ULP, on either side of FP32's curve. The
    axis spans FP32's losses and leaves as much room again on either side; it is logarithmic where
    FP32's losses span two decades.
2. `distance_chart`: how far each arm's loss is from FP32's, with a logarithmic axis. The same band
    is the area under the noise; here it is seen even where it is too thin for the first chart.
3. `scale_chart`: the loss scale of each arm that has one, with a binary logarithmic axis.

A loss that is not finite is a mark on the upper edge. See `curves` for how the page stays small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from amp_convert.report import text as fmt
from amp_convert.report.charts.curves import (
    Point,
    curve,
    drawable,
    highest,
    mean,
    points,
    staircase,
    steps_a_point,
)
from amp_convert.report.charts.svg import (
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Mark,
    decades,
    line,
    log2,
    log10,
    round_numbers,
)
from amp_convert.validate.training.arm_specs import ARMS, FP32, NOISE
from amp_convert.validate.training.results import ArmRecord, PairedRun

_LOSS_HEIGHT, _DISTANCE_HEIGHT, _SCALE_HEIGHT = 230, 130, 120
_STROKE = 13
_MAX_DECADES = 8
_LOG_FROM = 100.0  # a range that a linear axis would squeeze into its lowest hundredth


@dataclass(frozen=True)
class Curve:
    """Path data that belongs to one arm."""

    arm: str
    path: str
    label: str = ""


@dataclass(frozen=True)
class StepChart:
    """Curves over the steps of training, in SVG user units.

    `ticks` are those of the vertical axis. `noise` is path data of the area that FP32's noise
    covers, `steps_a_point` of how many steps a point is the mean, `failures` the losses that are
    not finite, `ends` where arms stopped early, `skipped` short strokes at the steps whose update
    was left out, and `limit` the height of a scale of 1.
    """

    bottom: float
    ticks: tuple[Mark, ...]
    steps: tuple[Mark, ...]
    curves: tuple[Curve, ...]
    noise: str = ""
    steps_a_point: int = 1
    failures: tuple[Mark, ...] = ()
    ends: tuple[Mark, ...] = ()
    skipped: tuple[Curve, ...] = ()
    limit: Mark | None = None


# --- loss ---


def loss_chart(run: PairedRun) -> StepChart | None:
    """The losses of all arms but the noise arm; None when there is no finite one."""
    arms = _arms(run)
    bottom = TOP + _LOSS_HEIGHT
    x, steps = _step_axis(run)
    axis = _loss_axis(run, arms, x, bottom)
    if axis is None:
        return None
    y, ticks = axis
    return StepChart(
        bottom=bottom,
        ticks=ticks,
        steps=steps,
        curves=tuple(Curve(arm.arm, curve(arm.losses, x, y)) for arm in arms),
        noise=_band(run, x, y),
        steps_a_point=steps_a_point(x),
        failures=tuple(_failures(arms, x)),
        ends=tuple(_ends(run, arms, x, y)),
    )


def distance_chart(run: PairedRun) -> StepChart | None:
    """The distance of each arm's loss from FP32's; None when nowhere is any."""
    fp32, noise = run.arm(FP32.name), _noise(run)
    arms = [arm for arm in _arms(run) if arm.arm != FP32.name]
    if fp32 is None:
        return None
    far = {arm.arm: _distances(arm, fp32) for arm in arms}
    powers = decades([*itertools.chain(*far.values()), *noise], _MAX_DECADES)
    if powers is None:
        return None
    bottom = TOP + _DISTANCE_HEIGHT
    y = Axis(*powers, bottom, TOP, log10)
    x, steps = _step_axis(run)
    upper = [(place, y.at(far)) for (place, _), far in _noise_columns(run, x)]
    area = f"{line([(upper[0][0], bottom), *upper, (upper[-1][0], bottom)])}Z" if upper else ""
    return StepChart(
        bottom=bottom,
        ticks=_decade_ticks(powers, y),
        steps=steps,
        curves=tuple(Curve(name, curve(found, x, y, highest)) for name, found in far.items()),
        noise=area,
    )


def _arms(run: PairedRun) -> list[ArmRecord]:
    """The arms that are drawn as curves, each above those before it."""
    found = (run.arm(spec.name) for spec in ARMS if spec.charted)
    return [arm for arm in found if arm is not None and arm.losses]


def _step_axis(run: PairedRun) -> tuple[Axis, tuple[Mark, ...]]:
    last = max(run.steps, *(len(arm.losses) for arm in run.arms), 2)
    x = Axis(1, last, LEFT, RIGHT)
    ticks = [tick for tick in round_numbers(1, last, 10, least=1) if 1 <= tick <= last]
    return x, tuple(Mark(x.at(tick), 0, f"{tick:,.0f}") for tick in ticks)


def _loss_axis(
    run: PairedRun, arms: Sequence[ArmRecord], x: Axis, bottom: float
) -> tuple[Axis, tuple[Mark, ...]] | None:
    drawn = {arm.arm: _means(arm.losses, x) for arm in arms}
    band = [loss + far * side for (_, loss), far in _noise_columns(run, x) for side in (-1, 1)]
    every = [*itertools.chain(*drawn.values()), *band]
    own = drawn.get(FP32.name) or every
    if not own:
        return None
    logarithmic = min(own) > 0 and max(own) >= _LOG_FROM * min(own)
    measure = log10 if logarithmic else float
    low, high = measure(min(own)), measure(max(own))
    room = (high - low) or abs(high) or 1.0
    lowest = max(min(measure(min(every)), low), low - room)
    highest = min(max(measure(max(every)), high), high + room)
    if lowest == highest:
        lowest, highest = lowest - room / 2, highest + room / 2
    numbers = round_numbers(lowest, highest, 5, least=1 if logarithmic else 1e-290)
    y = Axis(numbers[0], numbers[-1], bottom, TOP, measure)
    spelt = "1e{:.0f}" if logarithmic else "{:.4g}"
    return y, tuple(Mark(LEFT, y.place(n), spelt.format(n)) for n in numbers)


def _means(losses: Sequence[float], x: Axis) -> list[float]:
    return [loss for _, loss in itertools.chain(*points(losses, x, mean))]


def _decade_ticks(powers: tuple[int, int], y: Axis) -> tuple[Mark, ...]:
    stride = 1 if powers[1] - powers[0] <= 4 else 2
    found = range(powers[1], powers[0] - 1, -stride)
    return tuple(Mark(LEFT, y.place(power), f"1e{power}") for power in found)


def _distances(arm: ArmRecord, fp32: ArmRecord) -> list[float]:
    """|loss - FP32's loss| of each step that both made; NaN where there is none to draw."""
    pairs = zip(arm.losses, fp32.losses, strict=False)
    return [abs(one - other) or math.nan for one, other in pairs]


def _noise(run: PairedRun) -> list[float]:
    """The largest difference so far between FP32 and FP32 nudged, while both are finite."""
    fp32, noise = run.arm(FP32.name), run.arm(NOISE.name)
    if fp32 is None or noise is None:
        return []
    pairs = zip(fp32.losses, noise.losses, strict=False)
    drawn = itertools.takewhile(lambda pair: drawable(pair[0]) and drawable(pair[1]), pairs)
    apart = itertools.takewhile(drawable, (abs(one - other) for one, other in drawn))
    return list(itertools.accumulate(apart, max))


def _band(run: PairedRun, x: Axis, y: Axis) -> str:
    upper, lower = [], []
    for (place, loss), far in _noise_columns(run, x):
        upper.append((place, y.at(loss + far)))
        lower.append((place, y.at(loss - far)))
    return f"{line([*upper, *reversed(lower)])}Z" if upper else ""


def _noise_columns(run: PairedRun, x: Axis) -> list[tuple[Point, float]]:
    """The points of FP32's curve, and how far the noise reaches from each; [] without noise."""
    fp32, noise = run.arm(FP32.name), _noise(run)
    if fp32 is None or not any(noise):
        return []
    base = itertools.chain(*points(fp32.losses[: len(noise)], x, mean))
    reach = itertools.chain(*points(noise, x, highest))
    return [(point, far) for point, (_, far) in zip(base, reach, strict=True)]


def _failures(arms: Iterable[ArmRecord], x: Axis) -> Iterator[Mark]:
    for arm in arms:
        marks: dict[int, Mark] = {}
        for step, loss in enumerate(arm.losses, 1):
            if not drawable(loss):
                place = x.at(step)
                label = f"{arm.arm}: loss {fmt.number(loss)} at step {step:,}"
                marks.setdefault(int(place), Mark(place, TOP, label))
        yield from marks.values()


def _ends(run: PairedRun, arms: Iterable[ArmRecord], x: Axis, y: Axis) -> Iterator[Mark]:
    for arm in arms:
        last = len(arm.losses)
        if arm.note and last and drawable(arm.losses[-1]):
            label = f"{arm.arm} stopped after step {last:,} of {run.steps:,}: {arm.note}"
            yield Mark(x.at(last), y.at(arm.losses[-1]), label)


# --- loss scale ---


def scale_chart(run: PairedRun) -> StepChart | None:
    """The loss scale of the mixed and the autocast arm; None when neither has one to draw."""
    arms = [arm for arm in _arms(run) if any(map(_on_axis, arm.scales))]
    if not arms:
        return None
    found = [log2(scale) for arm in arms for scale in arm.scales if _on_axis(scale)]
    bottom = TOP + _SCALE_HEIGHT
    numbers = round_numbers(min(found) - 1, max(found) + 1, 4, least=1)
    skipping = [arm for arm in arms if arm.skipped]
    y = Axis(numbers[0], numbers[-1], bottom - _STROKE * len(skipping), TOP, log2)
    x, steps = _step_axis(run)
    one = Mark(RIGHT, y.at(1), "a loss scale under 1 is a fault")
    return StepChart(
        bottom=bottom,
        ticks=tuple(Mark(LEFT, y.place(n), fmt.power_of_two(int(n))) for n in numbers),
        steps=steps,
        curves=tuple(Curve(arm.arm, staircase(arm.scales, x, y)) for arm in arms),
        skipped=tuple(
            _skipped(arm, x, bottom - 3 - _STROKE * row) for row, arm in enumerate(skipping)
        ),
        limit=one if numbers[0] <= 0 <= numbers[-1] else None,
    )


def _on_axis(scale: float) -> bool:
    return scale > 0 and drawable(scale)


def _skipped(arm: ArmRecord, x: Axis, y: float) -> Curve:
    places = dict.fromkeys(int(x.at(step)) for step in arm.skipped)
    shown = ", ".join(f"{step:,}" for step in arm.skipped[:20])
    more = ", ..." if len(arm.skipped) > 20 else ""
    label = f"{arm.arm}: {fmt.count(len(arm.skipped), 'step')} skipped: {shown}{more}"
    return Curve(arm.arm, "".join(f"M{place} {y:g}v-9" for place in places), label)
