"""The stages of a run that not every run has: the error's sources, ONNX, an archive, training,
`torch.compile`.

Each gives what it found, or why it did not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Budget
from amp_convert.core.batches import Batch
from amp_convert.core.errors import (
    ModelError,
    UnsupportedModelError,
    UsageError,
)
from amp_convert.core.progress import Progress
from amp_convert.loading.settings import Settings
from amp_convert.loading.user_functions import score
from amp_convert.onnx_file import write as onnx_export
from amp_convert.prepare import Prepared, batches_of, fitting_batches
from amp_convert.report import (
    OnnxSection,
    Unchecked,
)
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.saved_model.archive import write_archive
from amp_convert.validate.archive.compare import compare_archive
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.validate.compiled.compare import StepToCompile, compare_compiled
from amp_convert.validate.compiled.results import CompiledParity
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.training import setup as training_setup
from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.options import DEFAULT_STEPS
from amp_convert.validate.training.results import TrainingParity

ARCHIVE = "model.pt2"


def _fitting(prepared: Prepared, batches: int) -> Iterator[Batch]:
    """Of the batches that were compared those that a graph takes, since a file has nothing else."""
    given = batches_of(prepared.case, prepared.device, batches)
    return fitting_batches(prepared.captured, given, "eval_batches")


def attribute_(
    prepared: Prepared, converted: ConvertedModel, settings: Settings, progress: Progress
) -> Budget | Unchecked | None:
    """Where the error of the first batch comes from; None where nobody asks, or there is none."""
    if not settings.attribute or not converted.plan.low_nodes():
        return None
    progress.stage("attribute the error")
    try:
        args, kwargs, _ = next(_fitting(prepared, 1))
        return attribute(converted, args, kwargs)
    except (ModelError, UnsupportedModelError) as error:
        return Unchecked(reason=str(error))
    except torch.OutOfMemoryError:
        return Unchecked(reason="the gradients of one batch do not fit into the device's memory")


def export(
    prepared: Prepared,
    converted: ConvertedModel,
    settings: Settings,
    progress: Progress,
    work: Path | None,
    batches: int,
) -> OnnxSection | Unchecked:
    if not settings.onnx:
        return Unchecked(reason="--onnx was not given")
    if work is None:
        raise UsageError("there is no folder for the ONNX file", mend="Give one.")
    case = prepared.case
    progress.stage("export to ONNX")
    try:
        exported = onnx_export.export(
            converted,
            work / "model.onnx",
            "low" if settings.io_types == "low" else "keep",
            settings.opset,
            external_data=settings.external_data,
        )
    except UnsupportedModelError as error:  # the rest of the report is worth having without
        return Unchecked(reason=str(error))
    progress.stage("compare in ONNX Runtime", batches)
    parity = validate_onnx(
        converted,
        exported.file,
        _fitting(prepared, batches),
        fp32=exported.fp32,
        score=partial(score, case),
        lower_is_better=case.lower_is_better,
        on_batch=progress.advance,
    )
    name = Path(parity.path).name
    return OnnxSection(
        model=dataclasses.replace(exported.file, path=name),
        parity=dataclasses.replace(parity, path=name),
    )


def save(
    prepared: Prepared,
    converted: ConvertedModel,
    settings: Settings,
    progress: Progress,
    work: Path | None,
    batches: int,
) -> ArchiveParity | Unchecked:
    """The frozen model as an archive, read back and compared."""
    if not settings.save:
        return Unchecked(reason="--save was not given")
    if work is None:
        raise UsageError("there is no folder for the archive", mend="Give one.")
    case, path = prepared.case, work / ARCHIVE
    progress.stage("save as an archive")
    try:
        archive = write_archive(converted.freeze(), path)
        archive = dataclasses.replace(archive, path=path.name)
    except UnsupportedModelError as error:  # the rest of the report is worth having without
        return Unchecked(reason=str(error))
    progress.stage("compare the archive with FP32", batches)
    return compare_archive(
        converted,
        archive,
        path,
        batches_of(case, prepared.device, batches),
        score=partial(score, case),
        lower_is_better=case.lower_is_better,
        on_batch=progress.advance,
    )


def train(
    prepared: Prepared, converted: ConvertedModel, settings: Settings, progress: Progress
) -> TrainingParity | Unchecked:
    case, captured = prepared.case, prepared.captured
    if reason := training_setup.why_not(case, settings, captured):
        return Unchecked(reason=reason)
    options = training_setup.make_options(case, settings, prepared.device.device)
    steps = settings.steps or DEFAULT_STEPS
    progress.stage("train beside FP32", steps * options.seeds)
    with progress.interruptible() as should_stop:
        return compare_training(
            converted,
            training_setup.make_recipe(case, settings),
            training_setup.make_data(case, settings, prepared.device.device),
            options,
            tick=progress.advance,
            should_stop=should_stop,
            say=progress.say,
        )


def compile_(
    prepared: Prepared,
    converted: ConvertedModel,
    settings: Settings,
    progress: Progress,
    batches: int,
    trained: TrainingParity | Unchecked,
) -> CompiledParity | Unchecked:
    """The model under `torch.compile`, with a training step where training was compared."""
    if not settings.compile:
        return Unchecked(reason="--compile was not given")
    case = prepared.case
    progress.stage("compile and compare", batches)
    step: StepToCompile | str = "training was not compared"
    if isinstance(trained, TrainingParity):
        data = training_setup.make_data(case, settings, prepared.device.device)
        recipe = training_setup.make_recipe(case, settings)
        batch = next(data.train_batches(0))
        step = StepToCompile(batch, recipe.loss, case.path, trained.gradients.scale)
    return compare_compiled(
        converted,
        _fitting(prepared, batches),
        case.args,
        case.kwargs,
        step=step,
        score=partial(score, case),
        lower_is_better=case.lower_is_better,
        cuda_graphs=settings.cuda_graphs,
        on_batch=progress.advance,
    )
