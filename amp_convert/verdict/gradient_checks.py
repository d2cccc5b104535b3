"""The check of a verdict on the gradients of one step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_run_checks import NOISE_FACTOR

if TYPE_CHECKING:
    from amp_convert.validate.training.gradient_results import GradientParity, LayerGradient
    from amp_convert.validate.training.results import TrainingParity


@optional
def gradients_check(parity: TrainingParity, limits: Thresholds) -> Check:
    name, limit, found = "training.gradients", limits.gradient_rel_l2, parity.gradients
    difference, error = found.reference_rel_l2, found.total.rel_l2
    if found.drawn_outside:
        reason = (
            f"the model draws from {' and '.join(found.drawn_outside)}'s random numbers, and its "
            "graph does not: their gradients are of two draws"
        )
        return Check(name, CheckStatus.UNCHECKED, difference, limits.fidelity_rel_l2, reason)
    if not 0 <= difference <= limits.fidelity_rel_l2:
        reason = (
            "the captured FP32 graph has not the eager model's gradients (relative L2 difference "
            f"{difference:.3g})"
        )
        return Check(name, CheckStatus.FAIL, difference, limits.fidelity_rel_l2, reason)
    if wrong := _wrong(found):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return Check(name, CheckStatus.FAIL, error, limit, f"{wrong[0]}{more}")
    if error is None or not has_gradient(found):
        return Check(
            name, CheckStatus.UNCHECKED, None, limit, "no parameter has a gradient other than 0"
        )
    layer, lost = _most_lost(found, limits)
    kept = 0 <= lost <= limits.gradient_zeroed
    far = _furthest_off(found, limits)
    reason = (
        f"the gradients of one step, at a loss scale of {found.scale:g}, differ from FP32's by "
        f"{error:.3g} (relative L2 of all)"
    )
    if lost != 0:
        reason += f", and {100 * lost:.3g} % of those of {layer or 'the top level'} are 0, which "
        reason += "FP32's are not"
    if far is not None:
        reason += f"; those of {far.layer or 'the top level'} are off by {far.rel_l2:.3g} of theirs"
    if 0 <= error <= limit and kept and far is None:
        return Check(name, CheckStatus.PASS, error, limit, reason)
    if not found.same_random_numbers and math.isfinite(error + lost):
        return Check(
            name, CheckStatus.UNCHECKED, error, limit, f"{reason}; the random numbers differed"
        )
    if 0 <= error <= max(limit, _gradient_noise(found, limits)) and kept and not _beyond(far):
        reason += f"; that is no more than {_NOISE[limit > 0]}"
        return Check(name, CheckStatus.UNCHECKED, error, limit, reason)
    return Check(name, CheckStatus.FAIL, error, limit, reason)


_NOISE = {
    True: f"{NOISE_FACTOR:g} times what FP32's own differ by once its weights are rounded",
    False: "what kernels that add in no fixed order make of FP32",
}


def has_gradient(found: GradientParity) -> bool:
    """Whether FP32 has any gradient other than 0."""
    largest = found.total.ref_abs_max
    return largest is not None and largest > 0


def _wrong(found: GradientParity) -> list[str]:
    """What is wrong with the gradients whatever the tolerance; that the arms drew other random
    numbers is for `training.random` to say."""
    wrong = list(found.faults)
    if not math.isfinite(found.loss_mixed):
        wrong.append(f"the mixed loss is {found.loss_mixed}, FP32's is {found.loss_fp32:.4g}")
    return wrong


def _gradient_noise(found: GradientParity, limits: Thresholds) -> float:
    """The error up to which this batch cannot tell. Where bits have to be the same,
    `training.weights` is what they are required in."""
    if limits.gradient_rel_l2 == 0:
        return limits.fidelity_rel_l2
    rounded = found.rounded_rel_l2
    return 0.0 if rounded is None or not math.isfinite(rounded) else NOISE_FACTOR * rounded


def _judged_layers(found: GradientParity, limits: Thresholds) -> list[LayerGradient]:
    """The layers whose gradients are more than noise in FP32: moved by one ULP, its weights give
    nearly the same ones. A bias before a BatchNorm has none, and any cast wipes that out."""
    most = limits.layer_gradient_rel_l2

    def is_noise(layer: LayerGradient) -> bool:
        return layer.noise_rel_l2 is not None and not layer.noise_rel_l2 <= most

    return [layer for layer in found.layers if layer.ref_abs_max and not is_noise(layer)]


def _most_lost(found: GradientParity, limits: Thresholds) -> tuple[str, float]:
    """The layer that has lost the largest share of its gradients, and that share, NaN being the
    largest."""

    def share(layer: LayerGradient) -> float:
        lost = layer.zeroed_share or 0.0
        return math.inf if math.isnan(lost) else lost

    worst = max(_judged_layers(found, limits), key=share, default=None)
    return ("", 0.0) if worst is None else (worst.layer, worst.zeroed_share or 0.0)


def _furthest_off(found: GradientParity, limits: Thresholds) -> LayerGradient | None:
    """The layer whose gradients are furthest beyond the tolerance of a layer, if one's are."""
    off = [
        layer
        for layer in _judged_layers(found, limits)
        if layer.rel_l2 is not None and not layer.rel_l2 <= limits.layer_gradient_rel_l2
    ]

    def excess(layer: LayerGradient) -> float:
        return _beyond(layer) * 1e30 + (layer.rel_l2 or 0.0)

    return max(off, key=excess, default=None)


def _beyond(layer: LayerGradient | None) -> bool:
    """Whether a layer's gradients are off by more than what FP32's own are once its weights are
    rounded."""
    if layer is None or layer.rel_l2 is None:
        return False
    rounded = layer.rounded_rel_l2
    return rounded is None or not layer.rel_l2 <= NOISE_FACTOR * rounded < math.inf
