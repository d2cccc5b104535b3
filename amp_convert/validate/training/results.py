"""`TrainingParity`: what training the mixed model beside its FP32 original showed. Plain data.

See `compare` for how it is measured, and `training_checks` for how it is judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from amp_convert.core.batches import TRAIN_LOSS
from amp_convert.validate.training.arm_specs import FP32, MIXED
from amp_convert.validate.training.gradient_results import GradientParity
from amp_convert.validate.training.noninferiority import Noninferiority

WARM_UP_STEPS, WARM_UP_SHARE = 10, 0.05
"""How long a dynamic loss scale may look for its place: this many steps, or share of the run."""
SKIPPED_SHARE, SEARCH_SHARE = 0.01, 0.05


@dataclass(frozen=True)
class ArmRecord:
    """One model's training run over the steps of `PairedRun`.

    `arm` is its name (see `arm_specs`); `note` says why an arm stopped early, and is empty where it
    did not. Lists have one entry a step: `losses` the mean over a step's batches, unscaled;
    `gradient_norms` the L2 norm of all unscaled gradients before clipping; `scales` the loss scale,
    empty without one. `skipped` numbers the steps, from 1, whose update the loss scaler left out.

    After the last step: `drift` is the L2 distance of the weights from FP32's, and `moved` that
    from the initial weights, both relative to how far FP32's weights moved (None where those stayed
    where they were); `metrics` are means over the eval batches, weighted by batch size,
    and `metric_errors` the standard errors of their differences from FP32's, batch by batch.
    `milliseconds` is the median time of a step, the first one left out, `peak_bytes` the most that
    a step held, with weights, gradients and the optimizer's state.
    """

    arm: str
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    scales: tuple[float, ...]
    skipped: tuple[int, ...]
    drift: float | None
    moved: float | None
    metrics: dict[str, float]
    milliseconds: float | None
    peak_bytes: int | None
    weights_sha256: str
    note: str = ""
    metric_errors: dict[str, float] = field(default_factory=dict)

    @property
    def first_loss(self) -> float:
        """The loss at the first step; NaN without any."""
        return self.losses[0] if self.losses else math.nan

    @property
    def last_loss(self) -> float:
        """The mean loss of the last quarter of the steps; NaN without any."""
        last = self.losses[-max(1, len(self.losses) // 4) :]
        return sum(last) / len(last) if last else math.nan

    def metric(self, name: str) -> float:
        """A metric after the last step; NaN for one that there is not, or an arm that stopped."""
        if self.note:
            return math.nan
        return self.last_loss if name == TRAIN_LOSS else self.metrics.get(name, math.nan)


@dataclass(frozen=True)
class PairedRun:
    """All arms trained from one seed: the same initial weights, batches and random numbers.

    `steps` is how many updates each arm has made. `random_parted` is the first step, from 1, after
    which FP32 and mixed had drawn different random numbers; None if they never did.
    `initial_metrics` are the FP32 model's before the first step, {} where none were taken.
    `drawn_outside` names the generators outside of PyTorch ("Python", "NumPy") whose numbers one of
    the two drew and the other did not.
    """

    seed: int
    steps: int
    random_parted: int | None
    arms: tuple[ArmRecord, ...]
    initial_metrics: dict[str, float] = field(default_factory=dict)
    drawn_outside: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """What is wrong with the mixed arm whatever its losses, as a clause; empty if nothing is.

        In this order: a loss that is not finite where FP32's is; gradients likewise, unless the
        loss scaler left that step out; a loss scale under 1 or not finite; too many steps left out
        (see `_late`); weights, or a metric, that are no number after the last step where FP32's
        are.
        """
        mixed, fp32 = self.arm(MIXED.name), self.arm(FP32.name)
        if mixed is None or fp32 is None:
            return ""
        if step := _first_worse(fp32.losses, mixed.losses):
            have, want = mixed.losses[step - 1], fp32.losses[step - 1]
            return f"its loss is {have} at step {step}, where FP32's is {want:.4g}"
        if step := _first_worse(fp32.gradient_norms, mixed.gradient_norms, mixed.skipped):
            return f"its gradients are not finite at step {step}, where FP32's are"
        if wrong := [scale for scale in mixed.scales if not 1 <= scale < math.inf]:
            what = "fell under 1" if wrong[0] < 1 else "is not finite"
            return f"its loss scale {what}: {mixed.note or wrong[0]}"
        if late := self._late(mixed):
            return late
        if _is_number(fp32.moved) and not _is_number(mixed.moved):
            return "its weights are not finite after the last step"
        for name, value in fp32.metrics.items():
            if math.isfinite(value) and not _is_number(found := mixed.metrics.get(name)):
                said = "missing" if found is None else str(found)
                return f"its metric {name} is {said}, where FP32's is {value:.4g}"
        if more := sorted(mixed.metrics.keys() - fp32.metrics.keys() if not fp32.note else ()):
            return f"its metric {more[0]} is there on eval batches where FP32's is missing"
        return ""

    def _late(self, mixed: ArmRecord) -> str:
        """That too many steps were left out, as a clause; empty if not.

        A dynamic scale looks for its place at first: steps left out in the warm-up, or one after
        the other from the first step on, do not count, if the scale came down after each. Of the
        others there may be `SKIPPED_SHARE` (one alone never counts: a short run cannot tell it
        from bad luck); and `SEARCH_SHARE` where the scale has only ever come down: as gradients
        grow while training goes on, it is still looking.
        """
        warm_up = max(WARM_UP_STEPS, round(WARM_UP_SHARE * self.steps))
        leading = sum(number == step for number, step in enumerate(mixed.skipped, 1))
        scales = mixed.scales

        def stayed(step: int) -> bool:
            return step < len(scales) and scales[step] >= scales[step - 1]

        late = [s for s in mixed.skipped if s > max(warm_up, leading) or stayed(s)]
        rose = any(after > before for before, after in pairwise(scales))
        share = SKIPPED_SHARE if rose or any(map(stayed, mixed.skipped)) else SEARCH_SHARE
        if len(late) <= max(1, share * (self.steps - warm_up)):
            return ""
        return (
            f"{len(late)} of its {self.steps} steps were left out because gradients overflowed, "
            "not counting those in which the loss scale looked for its place"
        )

    def arm(self, name: str) -> ArmRecord | None:
        """The arm of this name; None where it did not run."""
        return next((arm for arm in self.arms if arm.arm == name), None)


@dataclass(frozen=True)
class SeedPair:
    """The judged metric of one seed's FP32 and mixed arm after the last step.

    `failure` says why the mixed arm has failed whatever its metric, and is empty where it has not.
    """

    seed: int
    fp32: float
    mixed: float
    failure: str = ""

    @classmethod
    def of(cls, run: PairedRun, metric: str) -> SeedPair:
        """The pair that a run of both arms gives."""
        fp32, mixed = run.arm(FP32.name), run.arm(MIXED.name)
        assert fp32 is not None
        assert mixed is not None
        return cls(run.seed, fp32.metric(metric), mixed.metric(metric), run.failure)


@dataclass(frozen=True)
class TrainingParity:
    """Mixed training held against FP32 training.

    `steps` were asked for (by default at most `options.DEFAULT_STEPS`), and `ended` says why there
    are fewer; "" if there are not. `interrupted` is whether the user stopped it. `optimizer`,
    `schedule`, `initial_weights` and `loss_scaling` say in words what was used. `accumulate`
    batches make a step; gradients are clipped to `clip_norm` where that is not None. `metric` is
    the one that is judged over seeds: one of the user's metrics, "loss" for the mean loss on the
    eval batches, or "train_loss". `lower_is_better` names those metrics of which less is better.

    `gradients` compares one step; `run` is the first seed's. `pairs` has all seeds that ended and
    `noninferiority` the answer that they give; () and None where one seed was asked for.
    """

    dtype: str
    steps: int
    ended: str
    optimizer: str
    schedule: str
    initial_weights: str
    loss_scaling: str
    accumulate: int
    clip_norm: float | None
    metric: str
    lower_is_better: tuple[str, ...]
    gradients: GradientParity
    run: PairedRun
    pairs: tuple[SeedPair, ...]
    noninferiority: Noninferiority | None
    interrupted: bool = False


def _first_worse(
    fp32: Sequence[float], mixed: Sequence[float], left_out: Sequence[int] = ()
) -> int:
    """The first step, from 1, at which FP32's number is finite and the mixed one is not; 0 if none
    is."""
    pairs = enumerate(zip(fp32, mixed, strict=False), 1)
    return next(
        (
            step
            for step, (want, have) in pairs
            if math.isfinite(want) and not math.isfinite(have) and step not in left_out
        ),
        0,
    )


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
