"""What a run found -> `RunReport`."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch

from amp_convert import __version__
from amp_convert.attribute.results import Budget
from amp_convert.capture.captured import Captured
from amp_convert.capture.node_info import class_path
from amp_convert.core.device import Device
from amp_convert.loading.model_file import Case
from amp_convert.loading.settings import Settings
from amp_convert.plan.plan import Plan
from amp_convert.report.model import (
    Environment,
    Judged,
    ModelInfo,
    OnnxSection,
    PlanSection,
    RunReport,
    Unchecked,
)
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.validate.compiled.results import CompiledParity
from amp_convert.validate.inference.results import Divergence
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.verdict import Thresholds, judge


def assemble(
    case: Case,
    device: Device,
    captured: Captured,
    settings: Settings,
    plan: Plan,
    divergence: Divergence,
    training: TrainingParity | Unchecked,
    onnx: OnnxSection | Unchecked,
    compiled: CompiledParity | Unchecked,
    archive: ArchiveParity | Unchecked,
    budget: Budget | Unchecked | None,
) -> RunReport:
    """Judge what a run found, and put it together with what it ran on."""
    thresholds = Thresholds.for_dtype(
        settings.dtype,
        output_rel_l2=settings.tolerance,
        metric_tolerance=settings.metric_tolerance,
        min_speedup=settings.min_speedup,
    )
    trained = training if isinstance(training, TrainingParity) else None
    verdict = judge(
        captured.fidelity,
        plan,
        divergence,
        thresholds,
        metrics_supplied=case.metrics is not None,
        training=trained,
        training_required=case.trainable and settings.train is not False,
        no_training=training.reason if isinstance(training, Unchecked) else "",
        onnx=onnx.parity if isinstance(onnx, OnnxSection) else None,
        no_onnx=onnx.reason if isinstance(onnx, Unchecked) else "",
        onnx_required=settings.onnx,
        compiled=compiled if isinstance(compiled, CompiledParity) else None,
        archive=archive if isinstance(archive, ArchiveParity) else None,
        no_archive=archive.reason if isinstance(archive, Unchecked) else "",
        archive_required=settings.save,
    )
    return RunReport(
        amp_convert=__version__,
        model=model_info(case),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=verdict,
        environment=_environment(device, settings),
        fidelity=captured.fidelity,
        plan=PlanSection.of(plan),
        inference=divergence,
        training=training,
        onnx=onnx,
        compiled=compiled,
        archive=archive,
        attribution=budget,
        fixed_sizes=captured.fixed_sizes,
        judged=_judged(thresholds, divergence, trained),
    )


def _judged(
    thresholds: Thresholds, divergence: Divergence, training: TrainingParity | None
) -> Judged:
    limits = {name: value for name, value in vars(thresholds).items() if name != "dtype"}
    if training is None:
        return Judged(limits=limits, batches=divergence.batches, samples=divergence.samples)
    test = training.noninferiority
    return Judged(
        limits=limits,
        batches=divergence.batches,
        samples=divergence.samples,
        steps=training.run.steps,
        seeds=max(len(training.pairs), 1),
        margin=None if test is None else test.margin.value,
    )


def model_info(case: Case) -> ModelInfo:
    """Which model ran."""
    return ModelInfo(
        name=case.name,
        source=case.source,
        digest=case.digest,
        model_class=class_path(type(case.model)),
        parameters=sum(p.numel() for p in case.model.parameters()),
    )


def _environment(device: Device, settings: Settings) -> Environment:
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        platform=platform.platform(),
        processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        device=device.type,
        device_name=device.name,
        device_reason=device.reason,
        # Off in the FP32 arm, whatever the user's setting; other devices have no TF32.
        tf32=False if device.type == "cuda" else None,
        dtype=settings.dtype,
    )
