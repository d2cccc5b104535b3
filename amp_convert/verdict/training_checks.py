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
from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.gradient_checks import gradients_check, has_gradient
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_run_checks import (
    loss_check,
    metric_check,
    other_metric_checks,
    seeds_check,
    weights_check,
)

if TYPE_CHECKING:
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
    if not has_gradient(parity.gradients):
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
