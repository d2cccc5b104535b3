"""`TrainingParity`: what training the mixed model beside its FP32 original showed. Plain data.

See `training` for how it is measured, and `training_checks` for how it is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.gradients import GradientParity
from amp_convert.noninferiority import Noninferiority


@dataclass(frozen=True)
class TrainingArm:
    """One model's training run over the steps of `PairedRun`.

    `arm` is fp32, mixed, autocast (native `torch.autocast` with `GradScaler`) or noise (FP32 from
    initial weights nudged by one ULP); `note` says why an arm stopped early, and is empty where it
    did not. Lists have one entry a step: `losses` the mean over a step's batches, unscaled;
    `gradient_norms` the L2 norm of all unscaled gradients before clipping; `scales` the loss scale,
    empty without one. `skipped` numbers the steps, from 1, whose update the loss scaler left out.

    After the last step: `drift` is the L2 distance of the weights from FP32's, and `moved` that
    from the initial weights, both relative to how far FP32's weights moved (None where those stayed
    where they were); `metrics` are means over the eval batches, weighted by batch size.
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


@dataclass(frozen=True)
class PairedRun:
    """All arms trained from one seed: the same initial weights, batches and random numbers.

    `steps` is how many updates each arm has made. `random_parted` is the first step, from 1, after
    which FP32 and mixed had drawn different random numbers; None if they never did.
    """

    seed: int
    steps: int
    random_parted: int | None
    arms: tuple[TrainingArm, ...]

    def arm(self, name: str) -> TrainingArm | None:
        """The arm of this name; None where it did not run."""
        return next((arm for arm in self.arms if arm.arm == name), None)


@dataclass(frozen=True)
class SeedPair:
    """The judged metric of one seed's FP32 and mixed arm after the last step."""

    seed: int
    fp32: float
    mixed: float


@dataclass(frozen=True)
class TrainingParity:
    """Mixed training held against FP32 training.

    `steps` were asked for (by default at most `training.DEFAULT_STEPS`), and `ended` says why there
    are fewer; "" if there are not. `optimizer`, `schedule`, `initial_weights` and `loss_scaling`
    say in words what was used. `accumulate` batches make a step; gradients are clipped to
    `clip_norm` where that is not None. `metric` is the one that is judged over seeds: one of the
    user's metrics, or "loss" for the mean loss on the eval batches.

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
    lower_is_better: bool
    gradients: GradientParity
    run: PairedRun
    pairs: tuple[SeedPair, ...]
    noninferiority: Noninferiority | None
