"""A training comparison with chosen values, for the tests to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from amp_convert.core.exponent_histogram import ExponentHistogram, ScaleAdvice
from amp_convert.validate.training.gradient_results import (
    ActivationGradient,
    GradientDifference,
    GradientParity,
    GradientRange,
    LayerGradient,
    ParameterGradient,
)
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import Noninferiority, judge_pairs
from amp_convert.validate.training.results import ArmRecord, PairedRun, SeedPair, TrainingParity
from tests.report.builders import HOSTILE

SCALED = (65536.0, 32768.0, 32768.0, 32768.0, 32768.0, 32768.0, 32768.0, 32768.0)
FP32_LOSSES = (2.0, 1.5, 1.25, 1.0, 0.75, 0.5, 0.5, 0.25)


def arm_of(name: str, losses: Sequence[float], **changes: object) -> ArmRecord:
    """An arm without a loss scale whose weights moved as far as FP32's."""
    base = ArmRecord(
        arm=name,
        losses=tuple(losses),
        gradient_norms=tuple(1.0 for _ in losses),
        scales=(),
        skipped=(),
        drift=0.0,
        moved=1.0,
        metrics={"loss": 0.5, "accuracy": 0.75},
        milliseconds=2.0,
        peak_bytes=3 * 2**20,
        weights_sha256="00",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def run_of(*arms: ArmRecord) -> PairedRun:
    """A run of as many steps as its longest arm."""
    return PairedRun(0, max((len(arm.losses) for arm in arms), default=0), None, arms)


def four_arms() -> PairedRun:
    """Eight steps; the mixed and the autocast arm skip the first and go on at half the scale."""
    scaled: dict[str, object] = {"scales": SCALED, "skipped": (1,), "drift": 0.02, "moved": 1.01}
    mixed = [loss + 0.001 for loss in FP32_LOSSES]
    return run_of(
        arm_of("fp32", FP32_LOSSES),
        arm_of(
            "mixed",
            mixed,
            **scaled,
            milliseconds=1.0,
            peak_bytes=2 * 2**20,
            gradient_norms=(math.inf, *(1.0 for _ in mixed[1:])),
            metrics={"loss": 0.501, "accuracy": 0.74},
        ),
        arm_of("autocast", mixed, **scaled, milliseconds=1.5),
        arm_of("noise", [loss + 1e-6 for loss in FP32_LOSSES], drift=1e-5),
    )


def difference(rel_l2: float, elements: int = 10, **changes: object) -> dict[str, object]:
    """The fields of a `GradientDifference`."""
    base = GradientDifference(elements, rel_l2, 0.999, 0.01, 2.0, 0.125, 0)
    return vars(replace(base, **changes))  # type: ignore[arg-type]


def parameter(name: str, rel_l2: float, **changes: object) -> ParameterGradient:
    """A parameter of shape (2, 5)."""
    layer = name.rpartition(".")[0]
    fields = difference(rel_l2, **changes)
    return ParameterGradient(**fields, name=name, layer=layer, shape=(2, 5))  # type: ignore[arg-type]


def activation(node: str, underflow: float | None) -> ActivationGradient:
    """The gradient with respect to one node's results."""
    layer, _, op = node.partition("#")[0].partition("/")
    return ActivationGradient(node, layer, op, 40, 0.5, 0, underflow, 0.0)


def range_of(counts: dict[int, int], zeros: int = 0, scale: float = 65536.0) -> GradientRange:
    """Gradients with these exponents and no others."""
    elements = sum(counts.values()) + zeros
    largest = 1.5 * 2.0 ** max(counts) if counts else 0.0
    histogram = ExponentHistogram(elements, zeros, 0, largest, counts)
    shares = [histogram.share_under(e, s) for s in (1.0, scale) for e in (-24, -14)]
    return GradientRange(histogram, *shares)


def gradients(**changes: object) -> GradientParity:
    """Two layers of the `small_report`, in FP16 at a loss scale of 65536."""
    base = GradientParity(
        dtype="float16",
        scale=65536.0,
        loss_fp32=2.0,
        loss_mixed=2.001,
        reference_rel_l2=0.0,
        same_random_numbers=True,
        total=GradientDifference(**difference(0.004, 30)),  # type: ignore[arg-type]
        parameters=(
            parameter("features.0.weight", 0.003),
            parameter("features.0.bias", 0.0),
            parameter("classifier.weight", 0.005, cosine=0.99),
        ),
        layers=(
            LayerGradient(**difference(0.0025, 20), **_lost("features.0", 0.25)),  # type: ignore[arg-type]
            LayerGradient(**difference(0.005), **_lost("classifier", 0.0)),  # type: ignore[arg-type]
            LayerGradient(0, None, None, None, None, None, 0, **_lost("features.1", 0.5)),  # type: ignore[arg-type]
        ),
        activations=(
            activation("features.0/aten.conv2d#0", 0.25),
            activation("features.1/aten.relu#0", 0.5),
            activation("classifier/aten.linear#0", 0.0),
        ),
        weight_range=range_of({-12: 10, -3: 30}),
        activation_range=range_of({-27: 10, -20: 40, -10: 50}, zeros=20),
        recommended=ScaleAdvice(8192.0, "the largest FP32 gradient is 2", 0.0625, 0.0),
        without_gradient=(),
        only_fp32=(),
        only_mixed=(),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _lost(layer: str, underflow: float) -> dict[str, object]:
    return {
        "layer": layer,
        "grad_underflow_fraction": underflow,
        "scaled_grad_underflow_fraction": 0.0,
    }


def parity(**changes: object) -> TrainingParity:
    """Eight steps of SGD from one seed, judged by accuracy."""
    base = TrainingParity(
        dtype="float16",
        steps=8,
        ended="",
        optimizer="SGD, learning rate 0.1",
        schedule="StepLR",
        initial_weights="the model's own",
        loss_scaling="dynamic, from 65536",
        accumulate=2,
        clip_norm=1.0,
        metric="accuracy",
        lower_is_better=("loss", "train_loss"),
        gradients=gradients(),
        run=four_arms(),
        pairs=(),
        noninferiority=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def over_seeds(
    fp32: Sequence[float], mixed: Sequence[float], margin: float = 0.05, *, lower: bool = False
) -> dict[str, object]:
    """What `parity` takes for a test over seeds of these metrics."""
    pairs = tuple(
        SeedPair(seed, *values) for seed, values in enumerate(zip(fp32, mixed, strict=True))
    )
    answer: Noninferiority = judge_pairs(fp32, mixed, Margin(margin), lower_is_better=lower)
    return {"pairs": pairs, "noninferiority": answer}


def hostile_parity() -> TrainingParity:
    """Every text that comes from a model or its file replaced by a hostile one."""
    arms = tuple(
        replace(arm, note=name, metrics=dict.fromkeys(HOSTILE, 1.0))
        for arm, name in zip(four_arms().arms, HOSTILE, strict=False)
    )
    failed = [SeedPair(seed, 1.0, 0.5, name) for seed, name in enumerate(HOSTILE)]
    return parity(
        ended=HOSTILE[0],
        optimizer=HOSTILE[1],
        schedule=HOSTILE[2],
        metric=HOSTILE[3],
        run=replace(four_arms(), arms=arms),
        gradients=gradients(
            parameters=tuple(parameter(f"{name}.{name}", 0.5) for name in HOSTILE),
            only_fp32=HOSTILE,
            without_gradient=HOSTILE,
        ),
        **(over_seeds([0.9] * 5, [0.9] * 5) | {"pairs": tuple(failed)}),
    )


def long_parity(steps: int) -> TrainingParity:
    """A noisy run of many steps whose loss scale changes at every one, with four arms."""
    fp32 = [2 / (1 + step / 100) + 0.2 * math.sin(step * 12.9898) for step in range(steps)]
    mixed = [loss + 0.01 * math.sin(step * 78.233) for step, loss in enumerate(fp32)]
    scales = tuple(2.0 ** (8 + step % 9) for step in range(steps))
    low: dict[str, object] = {"scales": scales, "skipped": tuple(range(1, steps + 1, 3))}
    return parity(
        steps=steps,
        run=run_of(
            arm_of("fp32", fp32),
            arm_of("mixed", mixed, **low),
            arm_of("autocast", mixed[::-1], **low),
            arm_of("noise", [loss + 0.001 for loss in fp32]),
        ),
    )
