"""The checks of a verdict on training: one function a check, pure.

1. `training.steps`: were all steps made? Else the rest below speaks of a shorter run.
2. `training.sound`: is there something to learn from, and is nothing wrong with the mixed arm
   whatever its losses (see `PairedRun.failure`)? Judged in all seeds' runs, before all statistics.
3. `training.learnt`: did FP32 learn anything in these steps? Else nothing was tested.
4. `training.random`: did both arms draw the same random numbers? Else dropout hit other elements,
   and the arms are no pair.
5. `training.gradients`: are the gradients of one step FP32's? All are there and finite, no layer
   has lost many of its own to underflow, or is far from FP32's, and all together are near to
   FP32's. Each layer is held to its own noise. Where FP32's own part by as much once its weights
   are rounded, that last question has no answer on this batch.
6. `training.weights`: have the weights of the first run moved as far as FP32's?
7. After one run, `training.loss`: is the loss of its last quarter FP32's? And `training.metric`: is
   the metric that was named before it, `TrainingParity.metric`, no worse?
8. With several seeds, in place of these two, `training.seeds`: see `noninferiority`.
9. `training.metrics.NAME`: is each other metric of the first run no worse?

See `training_run_checks` for 6 to 9.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from amp_convert.validate.training.arm_specs import FP32, MIXED
from amp_convert.validate.training.learning import LEAST_GAIN, Learning
from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_run_checks import (
    NOISE_FACTOR,
    loss_check,
    metric_check,
    other_metric_checks,
    seeds_check,
    weights_check,
)

if TYPE_CHECKING:
    from amp_convert.validate.training.gradient_results import GradientParity, LayerGradient
    from amp_convert.validate.training.results import ArmRecord, TrainingParity

MIN_STEPS = 5
"""In fewer steps too little is learnt to see a difference in it."""


def training_checks(
    parity: TrainingParity | None,
    reason: str,
    limits: Thresholds,
    *,
    metrics_supplied: bool = True,
    required: bool = False,
) -> tuple[Check, ...]:
    """All checks on training; one unchecked one with `reason` where there was none, `required`
    where the user gives all that training takes."""
    if parity is None:
        return (Check("training", CheckStatus.UNCHECKED, None, None, reason, required=required),)
    over_seeds = bool(parity.pairs) or parity.noninferiority is not None
    by_metric = [seeds_check(parity)]
    if not over_seeds:
        metric = metric_check(parity, limits, supplied=metrics_supplied)
        by_metric = [loss_check(parity, limits), metric]
    after_steps = (weights_check(parity, limits), *by_metric, *other_metric_checks(parity, limits))
    return (
        steps_check(parity),
        sound_check(parity),
        learnt_check(parity),
        random_check(parity),
        gradients_check(parity, limits),
        *(_of_a_pair(parity, check) for check in after_steps),
    )


def _of_a_pair(parity: TrainingParity, check: Check) -> Check:
    """A check on what the steps came to. Arms that drew other numbers from outside of PyTorch are
    no pair: then a difference is no fault of the conversion's."""
    if not parity.run.drawn_outside or check.status is not CheckStatus.FAIL:
        return check
    reason = f"{check.reason}; the arms drew other random numbers"
    return replace(check, status=CheckStatus.UNCHECKED, reason=reason)


def steps_check(parity: TrainingParity) -> Check:
    name, run, asked = "training.steps", parity.run, float(parity.steps)
    lengths = (
        len(arm.losses) if (arm := run.arm(which)) else 0 for which in (FP32.name, MIXED.name)
    )
    made = min(run.steps, *lengths)
    why = parity.ended
    if not why and made < parity.steps:
        why = f"{made} of {parity.steps} steps were made"
    elif not why and made < MIN_STEPS:
        why = f"too little is learnt in {made} steps: give --steps {MIN_STEPS} or more"
    if why:
        return Check(name, CheckStatus.UNCHECKED, float(made), asked, why)
    reason = f"both arms made {made} steps from the same weights on the same batches"
    return Check(name, CheckStatus.PASS, float(made), asked, reason)


def sound_check(parity: TrainingParity) -> Check:
    name, run = "training.sound", parity.run
    failures = [f"seed {pair.seed}: {pair.failure}" for pair in parity.pairs if pair.failure]
    if run.failure or failures:
        count = float(max(len(failures), 1))
        return Check(
            name, CheckStatus.FAIL, count, 0.0, f"the mixed arm: {run.failure or failures[0]}"
        )
    fp32, mixed = run.arm(FP32.name), run.arm(MIXED.name)
    if fp32 is None or mixed is None or not mixed.losses:
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, "no step was made")
    if what := fp32.note or mixed.note or _broken(fp32):
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, f"FP32 training itself failed: {what}")
    if not _has_gradient(parity.gradients):
        what = "FP32 has no gradient other than 0 at the first step, so nothing is learnt"
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, what)
    scale = f", loss scale {mixed.scales[-1]:g} at the end" if mixed.scales else ""
    reason = f"every loss is finite, {len(mixed.skipped)} of {run.steps} steps left out{scale}"
    return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)


def _broken(fp32: ArmRecord) -> str:
    """What FP32 itself has no number for, as a clause; empty if nothing."""
    numbers = [("loss", loss) for loss in fp32.losses]
    numbers += [(f"metric {name}", value) for name, value in fp32.metrics.items()]
    if fp32.moved is not None and not math.isfinite(fp32.moved):
        return "its weights are not finite after the last step"
    return next(
        (f"its {name} is {value}" for name, value in numbers if not math.isfinite(value)), ""
    )


def learnt_check(parity: TrainingParity) -> Check:
    """Arms that learn nothing agree, whatever is wrong with one of them."""
    name, fp32 = "training.learnt", parity.run.arm(FP32.name)
    if fp32 is None or not fp32.losses:
        return Check(name, CheckStatus.UNCHECKED, None, None, "no step was made")
    found = Learning.of(fp32.losses)
    if not math.isfinite(found.z):
        reason = "too few losses, or losses that are no numbers, show nothing that was learnt"
        return Check(name, CheckStatus.UNCHECKED, None, LEAST_GAIN, reason)
    reason = (
        f"FP32's loss went from {found.first:.4g} to {found.last:.4g} in {parity.run.steps} steps, "
        "both the means of a quarter"
    )
    if found.learnt:
        return Check(name, CheckStatus.PASS, found.gain, LEAST_GAIN, reason)
    if found.gain > LEAST_GAIN:
        reason += ", but up and down as by chance"
    reason += (
        ": too little was learnt for the mixed model to fail at. Give more --steps, a larger "
        "learning rate, or an initial_model(seed) that is not trained yet"
    )
    return Check(name, CheckStatus.UNCHECKED, found.gain, LEAST_GAIN, reason)


def random_check(parity: TrainingParity) -> Check:
    """Not required, but for numbers from outside of PyTorch: a graph holds those of one draw."""
    check = _random_check(parity)
    return replace(check, required=bool(parity.run.drawn_outside))


def _random_check(parity: TrainingParity) -> Check:
    name, run = "training.random", parity.run
    if not run.steps:
        return Check(name, CheckStatus.UNCHECKED, None, None, "no step was made")
    if run.drawn_outside:
        reason = (
            f"the model draws from {' and '.join(run.drawn_outside)}'s random numbers while it "
            "runs, and a graph holds those of one draw for ever: the arms are no pair. Draw from "
            "torch"
        )
        return Check(name, CheckStatus.UNCHECKED, float(run.random_parted or 1), None, reason)
    if run.random_parted is None and parity.gradients.same_random_numbers:
        reason = "both arms drew the same random numbers at every step"
        return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)
    first = run.random_parted or 1
    reason = (
        f"the arms drew other random numbers from step {first} on: where dropout hits other "
        "elements, they differ by more than precision"
    )
    return Check(name, CheckStatus.UNCHECKED, float(first), None, reason)


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
    if error is None or not _has_gradient(found):
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


def _has_gradient(found: GradientParity) -> bool:
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
