"""The stages in order: a model file in, a `RunReport` out.

load -> capture -> profile -> plan -> rewrite -> validate -> train -> judge. Each stage is a
function of the ones before; this module only calls them, moves things to the chosen device and says
how far it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from amp_convert import optional_stages as stages
from amp_convert.core import device as devices
from amp_convert.core.device import Device
from amp_convert.core.errors import UsageError
from amp_convert.core.number_formats import from_name
from amp_convert.core.optional_packages import require
from amp_convert.core.progress import Logged, Progress, Silent
from amp_convert.gate import GateResult
from amp_convert.gate import compare as gate
from amp_convert.gate.baseline import Baseline, BaselineModel, load_baseline
from amp_convert.gate.compare import refuse_other
from amp_convert.loading.model_file import Case, load_case
from amp_convert.loading.settings import Settings
from amp_convert.loading.user_functions import score
from amp_convert.plan.plan import Plan
from amp_convert.prepare import batches_of, on_device, prepare
from amp_convert.report import (
    RunReport,
)
from amp_convert.report.assemble import assemble, model_info
from amp_convert.report.writers.json_report import verdict_text
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Painting, ask_for_fp32
from amp_convert.saved_model.archive import add_verdict
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.validate.inference import costs
from amp_convert.validate.inference.compare import compare
from amp_convert.validate.inference.layer_times import layer_times
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training import setup as training_setup
from amp_convert.validate.training.margin import MIN_SPREAD_SEEDS
from amp_convert.validate.training.options import DEFAULT_STEPS
from amp_convert.validate.training.results import TrainingParity
from amp_convert.validate.training.seed_spread import SeedSpread, make_seed_spread
from amp_convert.verdict.verdict import Verdict

NODE_BATCHES = 8
"""Nodes are compared on so many batches; outputs and metrics on all."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run made: the report, the whole plan, the converted model, the files that go with the
    report, and what the gate found where the settings name a baseline."""

    report: RunReport
    plan: Plan
    converted: ConvertedModel
    files: tuple[Path, ...] = ()
    gated: GateResult | None = None

    @property
    def verdict(self) -> Verdict:
        """What all checks add up to."""
        return self.report.verdict

    @property
    def exit_code(self) -> int:
        """The verdict's, or where that is a pass the gate's."""
        return self.verdict.exit_code or (self.gated.exit_code if self.gated else 0)


def convert(source: str, settings: Settings, progress: Progress, work: Path) -> Run:
    """The main job for the model file at `source`: load it, and `check` what it holds. What is
    wrong with the settings is said first."""
    _check_settings(settings)
    load_rules(settings.rules)
    _expected(settings, devices.choose(settings.device))
    progress.stage("load the model")
    # A model that draws its initial weights without a seed is the same at every run.
    torch.manual_seed(0)
    return check(load_case(source), settings, progress, work)


def check(
    case: Case, settings: Settings, progress: Progress | None = None, work: Path | None = None
) -> Run:
    """Convert the model of `case` and judge the result.

    `work` is a folder for files that go with the report: with `settings.onnx` and `settings.save`
    there has to be one.
    Raises UsageError for wrong settings, ModelError for what is wrong with the case,
    UnsupportedModelError where no part of the model can be captured.
    """
    _check_settings(settings)
    device = devices.choose(settings.device)
    expected = _expected(settings, device, case)
    progress = Logged(progress or Silent())
    with contextlib.ExitStack() as stack:
        if not training_setup.why_not(case, settings):
            # What is wrong with these settings is said now, and not after minutes of work.
            training_setup.make_options(case, settings, device.device)
            if settings.checkpoint:
                stack.enter_context(checkpoint.alone(Path(settings.checkpoint)))
        return _checked(case, settings, expected, progress, work)


def _checked(
    case: Case,
    settings: Settings,
    expected: Baseline | None,
    progress: Progress,
    work: Path | None,
) -> Run:
    prepared = prepare(case, settings, progress, judges=True)
    case, captured = prepared.case, prepared.captured
    progress.stage("plan and rewrite")
    converted = convert_captured(
        captured, prepared.rules, prepared.stats, from_name(settings.dtype)
    )
    progress.stage("compare with FP32", settings.batches if case.eval_batches else 1)
    divergence = compare(
        converted,
        batches_of(case, prepared.device),
        score=partial(score, case),
        lower_is_better=case.lower_is_better,
        metrics_reason=f"{case.name} defines no metrics",
        fold_batch_norm=settings.fold_batch_norm,
        node_batches=NODE_BATCHES,
        at_most=settings.batches,
        seconds=settings.eval_seconds,
        on_batch=progress.advance,
        on_node=progress.node,
    )
    progress.stage("measure time and memory")
    measured = costs.measure(
        converted, case.args, case.kwargs, fold_batch_norm=settings.fold_batch_norm
    )
    times = layer_times(converted, case.args, case.kwargs) if settings.profile else ()
    divergence = dataclasses.replace(
        divergence,
        costs=measured,
        layer_times=times,
        slow_kernels=devices.slow_kernels(captured.device, from_name(settings.dtype)),
    )
    budget = stages.attribute_(prepared, converted, settings, progress)
    exported = stages.export(prepared, converted, settings, progress, work, divergence.batches)
    saved = stages.save(prepared, converted, settings, progress, work, divergence.batches)
    trained = stages.train(prepared, converted, settings, progress)
    compiled = stages.compile_(prepared, converted, settings, progress, divergence.batches, trained)
    progress.stage("judge")
    report = assemble(
        case,
        prepared.device,
        captured,
        settings,
        converted.plan,
        divergence,
        trained,
        exported,
        compiled,
        saved,
        budget,
    )
    if work is not None and isinstance(saved, ArchiveParity):
        add_verdict(work / stages.ARCHIVE, verdict_text(report.verdict))
    files = () if work is None else tuple(sorted(work.iterdir()))
    gated = None
    if expected is not None:
        gated = gate.compare(report, expected, metric_tolerance=settings.metric_tolerance)
    return Run(report, converted.plan, converted, files, gated)


def _expected(settings: Settings, device: Device, case: Case | None = None) -> Baseline | None:
    """The baseline that the settings name, which has to be of this dtype, device and model."""
    if not settings.baseline:
        return None
    baseline = load_baseline(Path(settings.baseline))
    model = None
    if case is not None:
        info = model_info(case)
        model = BaselineModel(name=info.name, model_class=info.model_class)
    refuse_other(baseline, dtype=settings.dtype, device=device.type, model=model)
    return baseline


def _check_settings(settings: Settings) -> None:
    """What can be wrong with the settings alone."""
    if settings.onnx:
        require("onnx", "onnx", "onnxscript", "onnxruntime")
    training_setup.load_margin(settings)
    rules = load_rules(settings.rules) if settings.fold_batch_norm else None
    if rules is not None and (rules.painting is Painting.AUTOCAST or ask_for_fp32(rules.files)):
        raise UsageError(
            "--fold-batch-norm changes bits, and these rules ask for those of PyTorch itself",
            mend="Leave it out, or give rules that do not.",
        )


def clean_up(run: Run, settings: Settings) -> None:
    """Delete the checkpoint of a training that has come to its end; to be called once the report
    is written."""
    training = run.report.training
    if settings.checkpoint and isinstance(training, TrainingParity) and not training.interrupted:
        checkpoint.remove(Path(settings.checkpoint))


def fp32_seeds(source: str, settings: Settings, progress: Progress) -> SeedSpread:
    """Train the FP32 model at `source` over `settings.seeds` seeds, and keep its metric."""
    progress.stage("load the model")
    device = devices.choose(settings.device)
    torch.manual_seed(0)
    case = on_device(load_case(source), device.device)
    training_setup.why_not(case, dataclasses.replace(settings, train=True))
    steps, seeds = settings.steps or DEFAULT_STEPS, settings.seeds or MIN_SPREAD_SEEDS
    progress.stage("train in FP32", steps * seeds)
    return make_seed_spread(
        case.model,
        training_setup.make_recipe(case, settings),
        training_setup.make_data(case, settings, device.device),
        training_setup.conditions(case, settings, device.device),
        name=case.name,
        seeds=seeds,
        metric=settings.train_metric,
        lower_is_better=case.lower_is_better,
        tick=progress.advance,
    )
