"""The checks of a verdict on what a paired training run came to: weights, loss and metrics. Pure.

One pair of runs is one draw: rounding of any kind moves a loss or a metric by luck, to either side.
So there are three answers. Within the tolerance passes. A difference that FP32 from weights nudged
by one ULP shows as well, or of at most `LUCK` times the tolerance, is unchecked: one pair cannot
tell, and the reason asks for seeds. More fails. NaN is never within anything, and where FP32 itself
has no number, nothing is judged.

A plan that converts nothing has to give FP32's bits, in losses, weights and buffers.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from amp_convert.core.batches import TRAIN_LOSS
from amp_convert.validate.training.arm_specs import AUTOCAST, FP32, MIXED, NOISE
from amp_convert.validate.training.noninferiority import Outcome, judge_pairs
from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.thresholds import RESOLVED, Thresholds, metric_holds, metric_limit

if TYPE_CHECKING:
    from amp_convert.validate.training.results import ArmRecord, PairedRun, TrainingParity

NOISE_FACTOR = 3.0
"""A difference up to this many times FP32's own noise cannot be told from noise."""
LUCK = 5.0
"""How many times the tolerance one pair may miss by luck. examples/digits_cnn.py trains in BF16 as
well as in FP32 by its accuracy; over 5 seeds of 264 steps its eval loss is 1.8 times the tolerance
of 1 % better to 4.4 times worse."""
MOVED = 2.0
"""How many times as far as FP32's, or less far, the mixed weights may move; up to the square of it
may be luck. In 50 steps of AdamW it is 0.97 to 1.01 for every model of tests/zoo.py; of SGD at a
rate that makes the loss jump, 0.57 to 1.5, and up to 2.4 in native autocast."""

MARGIN_SHARE = 0.5
"""Of what FP32 has gained, a margin may be this share."""

# Progress makes a metric's scale, but no more than this many times its value.
_MOST_PROGRESS = 3.0
_SEEDS = "; one pair cannot tell, --seeds can"


def weights_check(parity: TrainingParity, limits: Thresholds) -> Check:
    """Have the weights moved as far as FP32's? A model that does not learn at all can have a loss
    near to FP32's in a short run, but not this."""
    name, run = "training.weights", parity.run
    fp32, mixed, noise = run.arm(FP32.name), run.arm(MIXED.name), _complete(run, NOISE.name)
    exact = limits.loss_tolerance == 0
    # Over seeds the metric decides: a first pair that is off by luck does not block it.
    most = MOVED**2 if parity.noninferiority else MOVED
    shown = "the same bits" if exact else f"{1 / most:g} to {most:g}"
    if fp32 is None or mixed is None or fp32.moved is None or mixed.moved is None:
        return Check(name, CheckStatus.UNCHECKED, None, shown, "FP32's own weights have not moved")
    if not math.isfinite(fp32.moved):
        return Check(name, CheckStatus.UNCHECKED, None, shown, "FP32's own weights are not finite")
    drift = "" if mixed.drift is None else f", and lie {mixed.drift:.3g} of that way from FP32's"
    reason = f"the mixed weights have moved {mixed.moved:.4g} times as far as FP32's{drift}"
    if len(mixed.skipped) == run.steps:
        reason += ": the loss scale left out every step; give more --steps, or a lower scale"
        return Check(name, CheckStatus.UNCHECKED, mixed.moved, shown, reason)
    if exact:
        holds = mixed.drift == 0 and mixed.weights_sha256 == fp32.weights_sha256
        jitter = noise.drift if noise and noise.drift is not None else 0.0
        error = math.nan if mixed.drift is None else mixed.drift
        status, why = _judged(holds, error, 0.0, jitter)
    else:
        error, jitter = _powers(mixed.moved), _powers(noise.moved) if noise else 0.0
        status, why = _judged(error <= _powers(most), error, _powers(MOVED**2), jitter)
    return Check(name, status, mixed.moved, shown, reason + why)


def loss_check(parity: TrainingParity, limits: Thresholds) -> Check:
    """Is the loss of the last quarter of the steps FP32's?

    Relative to FP32's loss there or to how far it fell, whichever is larger: a loss that fell from
    2 to 0.001 is judged by the 2. A loss can be too good: without dropout, say. That never passes,
    but it is no failure either. Steps that the loss scaler left out put the mixed arm behind, so
    what FP32's loss was as many steps earlier is allowed as well.
    """
    name, run, limit = "training.loss", parity.run, limits.loss_tolerance
    fp32, mixed, noise = run.arm(FP32.name), run.arm(MIXED.name), _complete(run, NOISE.name)
    if fp32 is None or mixed is None or not mixed.losses:
        return Check(name, CheckStatus.UNCHECKED, None, limit, "no step was made")
    finite = all(map(math.isfinite, (*fp32.losses, fp32.last_loss)))
    if not finite or len(fp32.losses) != len(mixed.losses):
        reason = "FP32's own losses are not finite, or not of as many steps"
        return Check(name, CheckStatus.UNCHECKED, None, limit, reason)
    last, quarter = fp32.last_loss, fp32.losses[: max(1, len(fp32.losses) // 4)]
    quarter_mean = statistics.median(quarter)
    scale = max(abs(last), abs(quarter_mean - last))
    exact = limit == 0

    def apart(arm: ArmRecord) -> float:
        if not exact:
            return _relative(arm.last_loss - last, scale)
        steps = zip(arm.losses, fp32.losses, strict=True)
        return sum(_relative(have - want, scale) for have, want in steps)

    reason = (
        f"over the last quarter of {run.steps} steps the loss is {mixed.last_loss:.5g} mixed "
        f"against {last:.5g} in FP32"
    )
    if (behind := len(mixed.skipped)) and not exact:
        lag = _relative(_loss_before(fp32, behind) - last, scale)
        limit += lag
        reason += f", and {behind} steps that were left out make {lag:.2g} of the limit"
    error = apart(mixed)
    luck = math.inf if mixed.last_loss < last and not exact else LUCK * limit
    native = _complete(run, AUTOCAST.name) if not exact else None
    fell = _relative(quarter_mean - last, scale)
    as_lossy = apart(native) if native and error <= fell * MARGIN_SHARE else 0.0
    status, why = _judged(error <= limit, error, luck, apart(noise) if noise else 0.0, as_lossy)
    return Check(name, status, error, limit, reason + why)


def _loss_before(arm: ArmRecord, steps: int) -> float:
    """The mean loss of as many steps as `last_loss` has, `steps` earlier."""
    quarter = max(1, len(arm.losses) // 4)
    end = max(quarter, len(arm.losses) - steps)
    return sum(arm.losses[end - quarter : end]) / quarter


def metric_check(parity: TrainingParity, limits: Thresholds, *, supplied: bool = True) -> Check:
    """The metric that was named before the run; of the training loss, what `loss_check` says.

    Without eval batches there is none to judge, which nobody's model file can be held to: that is
    unchecked, under another name.
    """
    name, fp32 = "training.metric", parity.run.arm(FP32.name)
    if parity.metric != TRAIN_LOSS:
        return _metric_check(name, parity, parity.metric, limits)
    if fp32 is not None and fp32.metrics:
        return replace(loss_check(parity, limits), name=name)
    reason = "there are no eval batches, so no metric was computed after training"
    return Check("training.metrics", CheckStatus.UNCHECKED, None, None, reason, required=supplied)


def other_metric_checks(parity: TrainingParity, limits: Thresholds) -> list[Check]:
    """All other metrics. With each more of them, one is likelier to be off by luck."""
    fp32 = parity.run.arm(FP32.name)
    names = [] if fp32 is None else [metric for metric in fp32.metrics if metric != parity.metric]
    check = optional(_metric_check)
    return [check(f"training.metrics.{name}", parity, name, limits) for name in names]


def _metric_check(check: str, parity: TrainingParity, metric: str, limits: Thresholds) -> Check:
    run, lower = parity.run, metric in parity.lower_is_better
    want, have = (
        arm.metric(metric) if (arm := run.arm(which)) else math.nan
        for which in (FP32.name, MIXED.name)
    )
    if not math.isfinite(want):
        reason = f"{metric} is {want} after FP32 training, which judges nothing"
        return Check(check, CheckStatus.UNCHECKED, None, None, reason)
    limit = metric_limit(want, limits.metric_tolerance, lower_is_better=lower)
    allowance, went = abs(limit - want), abs(run.initial_metrics.get(metric, math.nan) - want)
    luck = LUCK * allowance
    if want and math.isfinite(went):  # a loss that fell from 2 to 0.04 is soon off by a tenth
        luck *= min(max(1.0, went / abs(want)), _MOST_PROGRESS)
    elif math.isfinite(went):
        luck = LUCK * limits.metric_tolerance * went
    mixed, noise = run.arm(MIXED.name), _complete(run, NOISE.name)
    resolved = RESOLVED * mixed.metric_errors.get(metric, 0.0) if mixed else 0.0
    luck = max(luck, resolved)
    worse = have - want if lower else want - have
    jitter = abs(noise.metric(metric) - want) if noise else 0.0
    holds = metric_holds(have, limit, lower_is_better=lower)
    native = _complete(run, AUTOCAST.name)
    learning = math.isfinite(went) and worse <= MARGIN_SHARE * went
    as_lossy = abs(native.metric(metric) - want) if native and learning else 0.0
    status, why = _judged(holds, worse, luck, jitter, as_lossy)
    if holds and -worse > max(allowance + luck, NOISE_FACTOR * jitter):
        status, why = CheckStatus.UNCHECKED, f": better by more than precision can make it{_SEEDS}"
    reason = f"{metric} is {have:.6g} mixed against {want:.6g} in FP32 after {run.steps} steps"
    return Check(check, status, have, limit, reason + why)


def seeds_check(parity: TrainingParity) -> Check:
    """The answer of the test over seeds, which has to follow from the pairs: see
    `noninferiority`."""
    name, found = "training.seeds", parity.noninferiority
    if found is None:
        return Check(name, CheckStatus.UNCHECKED, None, None, "the pairs were not judged")
    again = judge_pairs(
        [pair.fp32 for pair in parity.pairs],
        [math.nan if pair.failure else pair.mixed for pair in parity.pairs],
        found.margin,
        lower_is_better=found.lower_is_better,
    )
    value, limit = None if found.last is None else found.last.mean, -found.margin.value
    if again.status != found.status:
        reason = f"the answer is {found.status}, but the pairs say {again.status}"
        return Check(name, CheckStatus.UNCHECKED, value, limit, reason)
    if (gained := _gained(parity)) is not None and found.margin.value > MARGIN_SHARE * gained:
        reason = (
            f"the margin of {found.margin.value:.4g} is more than half of the {gained:.4g} that "
            f"{parity.metric} gained in FP32: a model that learnt half of it would pass. Give a "
            "smaller --margin, or more --steps"
        )
        return Check(name, CheckStatus.UNCHECKED, value, limit, reason)
    status = _STATUS[found.status]
    return Check(name, status, value, limit, f"{parity.metric}: {found.reason}")


def _gained(parity: TrainingParity) -> float | None:
    """How far the metric went in FP32, from before the first step to the mean over all seeds; None
    where that is not known."""
    before = parity.run.initial_metrics.get(parity.metric, math.nan)
    fp32 = parity.run.arm(FP32.name)
    if parity.metric == TRAIN_LOSS and fp32 is not None:
        before = fp32.first_loss
    after = [pair.fp32 for pair in parity.pairs]
    if not after or not all(map(math.isfinite, (before, *after))):
        return None
    return abs(statistics.fmean(after) - before)


_STATUS = {
    Outcome.PASS: CheckStatus.PASS,
    Outcome.FAIL: CheckStatus.FAIL,
    Outcome.INCONCLUSIVE: CheckStatus.UNCHECKED,
}


def _judged(
    holds: bool, error: float, luck: float, noise: float, native: float = 0.0
) -> tuple[CheckStatus, str]:
    """The status, and what to add to the reason; an error of `luck` may be just that. `native` is
    how far native autocast lies from FP32, where half of what FP32 has learnt is there: the dtype
    makes that of this training, and not the conversion. None of them excuses what is no number."""
    if holds:
        return CheckStatus.PASS, ""
    if 0 < error < math.inf:
        if error <= NOISE_FACTOR * noise < math.inf:
            return (
                CheckStatus.UNCHECKED,
                f"; FP32 nudged by one ULP parts by {noise:.3g} as well{_SEEDS}",
            )
        if error <= NOISE_FACTOR * native < math.inf:
            return (
                CheckStatus.UNCHECKED,
                f"; native autocast parts by {native:.3g} as well{_SEEDS}",
            )
        if error <= luck:
            return CheckStatus.UNCHECKED, f"; that is beyond the tolerance, but can be luck{_SEEDS}"
    return CheckStatus.FAIL, ""


def _complete(run: PairedRun, name: str) -> ArmRecord | None:
    """The arm, if it made all steps: the end of a shorter run is not comparable."""
    arm = run.arm(name)
    return arm if arm and not arm.note and len(arm.losses) == run.steps else None


def _powers(factor: float | None) -> float:
    """How many powers of two a factor is away from 1; infinite for what is no factor."""
    if factor is None or not 0 < factor < math.inf:
        return math.inf
    return abs(math.log2(factor))


def _relative(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return abs(difference) / scale if scale else math.inf
