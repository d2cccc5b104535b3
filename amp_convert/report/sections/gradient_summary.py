"""What the gradients of one step showed, drawn from a `GradientParity` once for every writer."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.core.exponent_histogram import SMALLEST_NORMAL, TINIEST
from amp_convert.report import text as fmt
from amp_convert.report.sections.summary import severity
from amp_convert.validate.training.gradient_results import GradientParity, GradientRange

UNDERFLOW, SUBNORMAL = fmt.power_of_two(TINIEST), fmt.power_of_two(SMALLEST_NORMAL)


@dataclass(frozen=True)
class RangeRow:
    """The FP32 gradients of weights or of activations: how many are not zero, the largest, and the
    shares of the nonzero ones under 2**-24 and 2**-14, before and after scaling."""

    of: str
    nonzero: str
    largest: str
    underflow: str
    subnormal: str
    scaled_underflow: str
    scaled_subnormal: str


@dataclass(frozen=True)
class WorstGradient:
    """A parameter whose gradient is far from FP32's, and how much of its layer's activation
    gradients is under 2**-24, before and after scaling."""

    name: str
    shape: str
    rel_l2: float | None
    cosine: float | None
    zeroed: str
    underflow: str
    scaled_underflow: str


def share(value: float | None) -> str:
    """A share as a percentage, small ones to two digits: a thousandth of the gradients may matter.

    Empty where there is nothing to have a share of.
    """
    if value is None:
        return ""
    if 0 < value < 0.001:
        return f"{100 * value:.2g} %" if value >= 1e-5 else "< 0.001 %"
    return fmt.percent(value)


def gradient_text(gradients: GradientParity) -> str:
    """The headline of the gradients, as a clause."""
    total = gradients.total
    if total.rel_l2 is None:
        return "no parameter has a gradient"
    zeroed = "" if total.zeroed_share is None else f", {share(total.zeroed_share)} turned to zero"
    own = gradients.rounded_rel_l2
    rounded = f" (FP32's own with its weights rounded once: {fmt.error(own)})"
    return (
        f"relative L2 error {fmt.error(total.rel_l2)}{'' if own is None else rounded}, "
        f"cosine {fmt.number(total.cosine)}{zeroed}, {at_scale(gradients)}"
    )


def at_scale(gradients: GradientParity) -> str:
    """ "at a loss scale of 65536"."""
    if gradients.scale == 1:
        return "without a loss scale"
    return f"at a loss scale of {fmt.scale(gradients.scale)}"


def underflow_text(gradients: GradientParity) -> str:
    """How much of the FP32 gradients FP16 would lose, as a clause."""
    ranges = (("activation", gradients.activation_range), ("weight", gradients.weight_range))
    parts = [
        f"{name} gradients {share(found.underflow_fraction)}"
        + (f", scaled {share(found.scaled_underflow_fraction)}" if gradients.scale != 1 else "")
        for name, found in ranges
        if found.underflow_fraction is not None
    ]
    return f"under {UNDERFLOW}: {'; '.join(parts)}" if parts else "every gradient is zero"


def advice_text(gradients: GradientParity, *, why: bool = True) -> str:
    """The recommended static loss scale and what it saves, as a clause; `why` adds the reason."""
    advice = gradients.recommended
    if gradients.dtype != "float16":
        return f"none, since {gradients.dtype} has FP32's range"
    if advice.scale is None:
        return f"none, since {advice.reason}"
    parts = [fmt.scale(advice.scale)]
    if advice.lost_with is not None:
        lost = f"{share(advice.lost_with)} of all gradients under {UNDERFLOW}"
        parts.append(f"with {lost}, against {share(advice.lost_without)} without a scale")
    return ", ".join(parts) + (f" ({advice.reason})" if why else "")


def range_note(gradients: GradientParity) -> str:
    """What the borders of FP16 mean to the low dtype of this run."""
    if gradients.dtype != "float16":
        return f"{gradients.dtype} has FP32's range: the borders are those that FP16 would have"
    return (
        f"FP16 has nothing between 0 and {UNDERFLOW}, and fewer digits under {SUBNORMAL}; "
        "a loss scale moves gradients away from there"
    )


def range_rows(gradients: GradientParity) -> list[RangeRow]:
    """Where the FP32 gradients lie: a row for activations, and one for weights."""
    ranges = (("activations", gradients.activation_range), ("weights", gradients.weight_range))
    return [_range_row(name, found) for name, found in ranges if found.histogram.elements]


def _range_row(name: str, found: GradientRange) -> RangeRow:
    return RangeRow(
        name,
        f"{sum(found.histogram.counts.values()):,} of {found.histogram.elements:,}",
        fmt.error(found.histogram.abs_max),
        share(found.underflow_fraction),
        share(found.subnormal_fraction),
        share(found.scaled_underflow_fraction),
        share(found.scaled_subnormal_fraction),
    )


def worst_gradients(gradients: GradientParity, limit: int = 10) -> list[WorstGradient]:
    """The `limit` parameters whose gradients are furthest from FP32's, worst first."""
    layers = {row.layer: row for row in gradients.layers}
    ranked = sorted(gradients.parameters, key=lambda row: -severity(row.rel_l2))
    found = []
    for row in ranked[:limit]:
        if not row.rel_l2:  # NaN is true
            continue
        layer = layers.get(row.layer)
        found.append(
            WorstGradient(
                row.name,
                " × ".join(map(str, row.shape)),
                row.rel_l2,
                row.cosine,
                share(row.zeroed_share),
                share(layer.grad_underflow_fraction if layer else None),
                share(layer.scaled_grad_underflow_fraction if layer else None),
            )
        )
    return found


def gradient_remarks(gradients: GradientParity) -> list[str]:
    """What is wrong whatever the tolerance, and which parameters do not learn in either model."""
    other = "the mixed model drew other random numbers than the FP32 model"
    found = [*(() if gradients.same_random_numbers else (other,)), *gradients.faults]
    if gradients.reference_rel_l2:
        found.append(
            "the captured FP32 graph's gradients differ from the eager model's by "
            f"{fmt.error(gradients.reference_rel_l2)}"
        )
    if names := gradients.without_gradient:
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        found.append(f"without a gradient in either model: {', '.join(names[:3])}{more}")
    return found
