"""A training comparison that passes every check, in the stages' own dataclasses.

Eight steps in FP16. FP32's loss falls from 2 to 0.5 in the last quarter, so 1.5 is what losses are
relative to. Tests replace the one field that they are about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from amp_convert.core.exponent_histogram import ExponentHistogram, ScaleAdvice
from amp_convert.validate.training.gradient_results import (
    GradientDifference,
    GradientParity,
    GradientRange,
    LayerGradient,
)
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import judge_pairs
from amp_convert.validate.training.results import ArmRecord, PairedRun, SeedPair, TrainingParity

LOSSES = (2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.5, 0.5)
STEPS = len(LOSSES)


def arm(name: str, losses: Sequence[float] = LOSSES, **changes: Any) -> ArmRecord:
    """An arm whose weights moved as far as FP32's."""
    base = ArmRecord(
        arm=name,
        losses=tuple(losses),
        gradient_norms=tuple(1.0 for _ in losses),
        scales=(),
        skipped=(),
        drift=0.0,
        moved=1.0,
        metrics={"loss": 0.6, "accuracy": 0.9},
        milliseconds=2.0,
        peak_bytes=2**20,
        weights_sha256="00",
    )
    return replace(base, **changes)


def mixed_arm(losses: Sequence[float] = LOSSES, **changes: Any) -> ArmRecord:
    """The mixed arm: a loss scale that stays, and other bits than FP32's."""
    own: dict[str, Any] = {"scales": (65536.0,) * len(losses), "drift": 0.02, "moved": 1.01}
    return arm("mixed", losses, **(own | {"weights_sha256": "01"} | changes))


def run(
    fp32: ArmRecord | None = None,
    mixed: ArmRecord | None = None,
    noise: ArmRecord | None = None,
    **changes: Any,
) -> PairedRun:
    """A run of these arms; the noise arm is FP32 to the last bit unless given."""
    arms = (fp32 or arm("fp32"), mixed or mixed_arm(), noise or arm("noise"))
    return replace(PairedRun(0, len(arms[0].losses), None, arms), **changes)


def difference(rel_l2: float = 1e-3, **changes: Any) -> dict[str, Any]:
    """The fields of a `GradientDifference`."""
    base = GradientDifference(100, rel_l2, 0.999, 1e-3, 1.0, 0.0, 0)
    return vars(replace(base, **changes))


def layer(name: str = "head", rel_l2: float = 1e-3, **changes: Any) -> LayerGradient:
    """A layer that has kept all of its gradients."""
    return LayerGradient(
        **difference(rel_l2, **changes),
        layer=name,
        grad_underflow_fraction=0.0,
        scaled_grad_underflow_fraction=0.0,
    )


def gradients(rel_l2: float = 1e-3, **changes: Any) -> GradientParity:
    """One step with an error of `rel_l2` over two layers."""
    seen = GradientRange(ExponentHistogram(100, 0, 0, 1.0, {-1: 100}), 0.0, 0.0, 0.0, 0.0)
    base = GradientParity(
        dtype="float16",
        scale=65536.0,
        loss_fp32=2.0,
        loss_mixed=2.0,
        reference_rel_l2=0.0,
        same_random_numbers=True,
        total=GradientDifference(**difference(rel_l2)),
        parameters=(),
        layers=(layer("encoder.0"), layer("head")),
        activations=(),
        weight_range=seen,
        activation_range=seen,
        recommended=ScaleAdvice(8192.0, "", 0.0, 0.0),
        without_gradient=(),
        only_fp32=(),
        only_mixed=(),
        rounded_rel_l2=5e-4,
    )
    return replace(base, **changes)


def parity(paired: PairedRun | None = None, **changes: Any) -> TrainingParity:
    """One seed, judged by accuracy."""
    paired = paired or run()
    base = TrainingParity(
        dtype="float16",
        steps=STEPS,
        ended="",
        optimizer="AdamW, learning rate 0.001",
        schedule="none",
        initial_weights="the model's own",
        loss_scaling="dynamic, from 65536",
        accumulate=1,
        clip_norm=None,
        metric="accuracy",
        lower_is_better=("loss", "train_loss"),
        gradients=gradients(),
        run=paired,
        pairs=(),
        noninferiority=None,
    )
    return replace(base, **changes)


def over_seeds(
    fp32: Sequence[float] = (0.9,) * 5,
    mixed: Sequence[float] = (0.9,) * 5,
    failures: Sequence[str] = (),
    margin: float = 0.02,
) -> TrainingParity:
    """The answer that these accuracies give, one a seed."""
    reasons = [*failures, *[""] * (len(fp32) - len(failures))]
    rows = zip(fp32, mixed, reasons, strict=True)
    pairs = tuple(SeedPair(seed, *row) for seed, row in enumerate(rows))
    judged = [math.nan if pair.failure else pair.mixed for pair in pairs]
    answer = judge_pairs(fp32, judged, Margin(margin), lower_is_better=False)
    return parity(pairs=pairs, noninferiority=answer)
