"""Thresholds and evidence in, one verdict out: the only place that says pass, fail or unchecked.

Every check answers one question and has a stable dotted name. It passes only on evidence: what was
not measured is unchecked, and every comparison is written so that NaN fails it.

1. `fidelity.eval`, `fidelity.train`: is the captured FP32 graph the eager model? And is it on every
   batch (`fidelity.batches`)?
2. `capture.whole`, `plan.low_precision`: was the whole model captured, and was any of it converted?
3. `outputs.finite`, `.rel_l2`, `.cosine`, `.max_abs`, `.agreement` (integers and booleans): are the
   outputs those of FP32? The worst output decides. A plan that converts nothing must be exact.
4. `outputs.vs_autocast`: is the error that of half precision, or of our rewrite?
5. `nodes.finite`: is every node finite that is finite in FP32? `frozen.identical`: is the model
   that gets deployed the one that was judged? `outputs.untuned`: and the graph that runs with
   gradients on?
6. `performance.inference`: is it faster? Required with `--min-speedup` alone.
7. `metrics.NAME`: do the user's own metrics hold?
8. `training.*`: does it train as FP32 does? See `training_checks`.
9. `onnx.*`: does its ONNX file compute the same? See `onnx_checks`.
10. `compiled.*`: and under `torch.compile`, where that was asked for? See `compiled_checks`.
11. `archive.outputs`: and the saved archive, where one was asked for? See `archive_check`.

The verdict fails when any check fails; it is inconclusive when a required check is unchecked;
otherwise it passes. The checks that do not block stay in the list as unchecked.

Not required are: `fidelity.train` and, where the user gives nothing to train with or wants none,
`training` (inference parity stands without them),
`capture.whole` (what was not captured runs in eager FP32, and the outputs cover it), and
`outputs.vs_autocast` (native autocast may not run a model that we can).

Once training has run, its checks are required, but for three that can fail and, unchecked, leave
the answer to the rest: `training.random` (a kernel may draw in another order for another dtype, and
dropout be as good), `training.gradients` (a batch may tell nothing about a model that amplifies any
rounding; many steps do), and `training.metrics.NAME` (one run says too little about a metric that
was not named before it). Where the user gives no metrics, none are asked for. Of an ONNX file all
checks are, but for `onnx.converted`: it says how closely two runtimes agree, and the outputs of
both are held against FP32 by checks of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from amp_convert.core.errors import UsageError
from amp_convert.core.mode import Mode
from amp_convert.verdict.archive_check import archive_checks
from amp_convert.verdict.arm_checks import folded_checks, untuned_check
from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.compiled_checks import compiled_checks
from amp_convert.verdict.inference_checks import (
    batches_check,
    buffers_check,
    capture_check,
    choice_checks,
    fidelity_check,
    frozen_check,
    inputs_check,
    low_precision_check,
    nodes_check,
    path_checks,
    reference_check,
)
from amp_convert.verdict.metric_checks import metric_checks
from amp_convert.verdict.onnx_checks import onnx_checks
from amp_convert.verdict.output_checks import autocast_check, output_checks
from amp_convert.verdict.performance_check import performance_check
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_checks import training_checks

if TYPE_CHECKING:
    from amp_convert.capture.fidelity import Fidelity
    from amp_convert.plan.plan import Plan
    from amp_convert.validate.archive.results import ArchiveParity
    from amp_convert.validate.compiled.results import CompiledParity
    from amp_convert.validate.inference.results import Divergence
    from amp_convert.validate.onnx.results import OnnxParity
    from amp_convert.validate.training.results import TrainingParity

__all__ = [
    "EXIT_CODES",
    "Check",
    "CheckStatus",
    "Thresholds",
    "Verdict",
    "VerdictStatus",
    "judge",
]


class VerdictStatus(StrEnum):
    """What all checks add up to."""

    PASS = "pass"  # noqa: S105  no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


EXIT_CODES = {VerdictStatus.PASS: 0, VerdictStatus.FAIL: 1, VerdictStatus.INCONCLUSIVE: 3}


@dataclass(frozen=True)
class Verdict:
    """All checks and what they add up to."""

    status: VerdictStatus
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.status]


def judge(
    fidelity: Sequence[Fidelity],
    plan: Plan,
    divergence: Divergence | None,
    thresholds: Thresholds,
    *,
    metrics_supplied: bool,
    training: TrainingParity | None = None,
    no_training: str = "training was not asked for",
    training_required: bool = False,
    onnx: OnnxParity | None = None,
    no_onnx: str = "--onnx was not given",
    onnx_required: bool = False,
    compiled: CompiledParity | None = None,
    archive: ArchiveParity | None = None,
    no_archive: str = "--save was not given",
    archive_required: bool = False,
) -> Verdict:
    """Hold the evidence against `thresholds`.

    `divergence` is None when the graphs could not be run side by side, as on the meta device;
    `training` and `onnx` when nothing was trained or exported, for the reason given.
    `metrics_supplied` is whether the user's file gives metrics: they are then required, as training
    is where `training_required`, an ONNX file where `onnx_required`, and an archive where
    `archive_required`. Raises UsageError when
    `thresholds` are those of another dtype than the plan's.
    """
    if thresholds.dtype != plan.dtype:
        raise UsageError(f"the thresholds are for {thresholds.dtype}, the plan for {plan.dtype}")
    limits, training_limits = (
        thresholds if any(decision.low for decision in decisions) else thresholds.exact()
        for decisions in (plan.eval, plan.train)
    )
    metrics = metric_checks(divergence, limits, supplied=metrics_supplied)
    metrics_hold = metrics_supplied and all(c.status is CheckStatus.PASS for c in metrics)
    checks = (
        fidelity_check(Mode.EVAL, fidelity, limits),
        optional(fidelity_check)(Mode.TRAIN, fidelity, limits),
        reference_check(plan, divergence, limits),
        batches_check(plan, divergence),
        inputs_check(plan, divergence),
        capture_check(plan),
        low_precision_check(plan),
        *output_checks(plan, divergence, limits, metrics_hold=metrics_hold),
        autocast_check(plan, divergence, limits),
        nodes_check(plan, divergence),
        *choice_checks(divergence),
        *path_checks(divergence),
        buffers_check(plan, divergence),
        frozen_check(divergence),
        untuned_check(plan, divergence, limits, metrics_hold=metrics_hold),
        *folded_checks(plan, divergence, limits),
        performance_check(divergence, limits),
        *compiled_checks(
            compiled,
            limits,
            slow_kernels=divergence.slow_kernels if divergence is not None else "",
        ),
        *archive_checks(archive, no_archive, limits, required=archive_required),
        *metrics,
        *training_checks(
            training,
            no_training,
            training_limits,
            metrics_supplied=metrics_supplied,
            required=training_required,
        ),
        *onnx_checks(
            onnx,
            no_onnx,
            limits,
            required=onnx_required,
            metrics_supplied=metrics_supplied,
        ),
    )
    return verdict_of(checks)


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """What checks add up to."""
    checks = tuple(checks)
    return Verdict(_status(checks), checks)


def _status(checks: Iterable[Check]) -> VerdictStatus:
    checks = tuple(checks)
    if any(check.status == CheckStatus.FAIL for check in checks):
        return VerdictStatus.FAIL
    if any(check.status != CheckStatus.PASS and check.required for check in checks):
        return VerdictStatus.INCONCLUSIVE
    return VerdictStatus.PASS
