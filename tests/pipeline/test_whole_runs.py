"""Whole runs: their report, and what is not done twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amp_convert import pipeline, planning
from amp_convert.capture import traced_region
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.progress import Silent
from amp_convert.loading.read_settings import make_settings
from amp_convert.loading.settings import Settings
from amp_convert.pipeline import Run
from amp_convert.prepare import prepare
from amp_convert.report import RunReport
from amp_convert.report.records import NodeRecord
from amp_convert.verdict import performance_check
from tests.command import MLP
from tests.pipeline.pipeline_models import COUNTING, Recorder


def timeless(report: RunReport) -> RunReport:
    """The report without what differs from one run to the next: the date, the costs and the check
    that speaks of them."""
    assert report.inference is not None
    inference = replace(report.inference, costs=())
    checks = tuple(check for check in report.verdict.checks if check.name != performance_check.NAME)
    assert len(checks) == len(report.verdict.checks) - 1
    verdict = replace(report.verdict, checks=checks)
    return report.model_copy(update={"created": "", "inference": inference, "verdict": verdict})


@pytest.mark.slow
def test_two_runs_give_the_same_report(convert: Callable[..., Run]) -> None:
    first = convert(COUNTING, batches=2)
    torch.rand(7)  # what happened before must not matter
    second = convert(COUNTING, batches=2)
    assert timeless(first.report) == timeless(second.report)
    assert first.plan == second.plan
    other = convert(COUNTING.replace("manual_seed(seed)", "manual_seed(seed + 1)"), batches=2)
    assert timeless(other.report).inference != timeless(first.report).inference


@pytest.mark.slow
def test_the_report_tells_of_this_model_and_this_plan(convert: Callable[..., Run]) -> None:
    run = convert(COUNTING)
    model = run.report.model
    assert (model.name, model.source, model.model_class) == ("model", "model.py", "model.Net")
    assert model.parameters == 8 * 8 + 8
    assert model.digest == hashlib.sha256(COUNTING.encode()).hexdigest()
    assert run.report.plan.decisions == tuple(map(NodeRecord.of, run.plan.eval))
    outputs = run.converted(torch.ones(4, 8))
    assert outputs.dtype == torch.float32
    assert not torch.equal(outputs, run.converted.captured.model(torch.ones(4, 8)))


@pytest.mark.slow
def test_tolerances_reach_the_verdict(convert: Callable[..., Run]) -> None:
    report = convert(MLP, tolerance=0.5, metric_tolerance=0.25).report
    checks = {check.name: check for check in report.verdict.checks}
    assert checks["outputs.rel_l2"].threshold == 0.5
    assert checks["metrics.score"].threshold == 0.75


@pytest.mark.slow
def test_the_audit_plans_as_the_conversion_does(convert: Callable[..., Run]) -> None:
    run = convert(COUNTING)
    progress = Recorder()
    plan, model = planning.audit("model.py", Settings(), progress)
    assert plan == run.plan
    assert model == run.report.model
    assert [name for name, _ in progress.stages] == [
        "load the model",
        "capture and check against eager FP32",
        "calibrate",
        "plan",
    ]


def test_what_is_refused_is_refused_before_the_model_file_runs(
    convert: Callable[..., Run],
) -> None:
    progress = Recorder()
    with pytest.raises(UsageError):
        convert("raise RuntimeError('the model file was run')", progress, rules=("fp23",))
    assert progress.stages == []


def test_not_training_is_no_refusal(convert: Callable[..., Run]) -> None:
    report = convert(MLP, train=False).report
    assert report.training.status == "unchecked"


@pytest.mark.slow
def test_an_error_in_a_batch_names_the_users_line(convert: Callable[..., Run]) -> None:
    late = MLP.replace("yield batch(seed), None", "yield batch(seed), 1 // (1 - seed)")
    line = late.splitlines().index("        yield batch(seed), 1 // (1 - seed)") + 1
    with pytest.raises(ModelError, match=rf"eval_batches\(\) raised Zero.* \(at model.py:{line}\)"):
        convert(late)


MODEL = """
import torch

def build_model():
    torch.manual_seed({seed})
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))

def example_inputs():
    return torch.linspace(-1, 1, 32).reshape(4, 8)
"""


@pytest.mark.usefixtures("no_other_tests")
@pytest.mark.slow
def test_what_was_captured_once_is_not_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    traced: list[Any] = []
    own = traced_region.export_graph
    monkeypatch.setattr(
        traced_region, "export_graph", lambda *a, **k: (traced.append(a), own(*a, **k))[1]
    )
    source = tmp_path / "kept.py"
    source.write_text(MODEL.format(seed=0))

    def traces(job: Callable[..., Any], *rest: Any, **settings: Any) -> tuple[int, Any]:
        traced.clear()
        found = job(str(source), make_settings(**{"cache": True, **settings}), Silent(), *rest)
        return len(traced), found

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # a first trace sets it
    assert traces(planning.audit, cache=False)[0] == 2
    assert not (tmp_path / "cache").exists()
    count, (first, _) = traces(planning.audit)
    assert count == 2
    count, (again, _) = traces(planning.audit)
    assert (count, again.eval) == (0, first.eval)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nop = "aten.gelu"\ncategory = "deny"\nreason = "mine"\n')
    count, (changed, _) = traces(planning.audit, rules=["default", str(rules)])
    assert count == 0
    assert "mine" in [decision.reason for decision in changed.eval]
    assert traces(planning.audit, dtype="bfloat16")[0] == 0
    count, run = traces(pipeline.convert, tmp_path)
    assert count == 0
    assert run.plan.eval == first.eval
    source.write_text(MODEL.format(seed=1))
    assert traces(planning.audit)[0] == 2


REFILLED = (
    MODEL.format(seed=0)
    + """
held = torch.empty(4, 8)

def eval_batches():
    for size in (1000.0, 1.0):
        yield held.fill_(size), None
"""
)


@pytest.mark.slow
@pytest.mark.usefixtures("no_other_tests")
@pytest.mark.parametrize("cache", [True, False])
def test_batches_that_are_one_tensor_are_measured_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "refilled.py"
    source.write_text(REFILLED)
    case, settings = pipeline.load_case(str(source)), make_settings(cache=cache)
    stats = prepare(case, settings, Silent(), judges=False).stats
    assert stats.batches == 2
    assert max(r.abs_max for name, r in stats.ranges.items() if " input " in name) == 1000
