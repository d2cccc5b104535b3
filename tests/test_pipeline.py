"""The stages of a run: their order, what settings bound, devices, fallback, and repeatability."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amp_convert import pipeline
from amp_convert.capture import traced_region
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.progress import Silent
from amp_convert.loading import user_code as usercode
from amp_convert.loading.settings import Settings, make_settings
from amp_convert.pipeline import Run
from amp_convert.prepare import prepare
from amp_convert.report import RunReport
from amp_convert.report.records import NodeRecord
from amp_convert.verdict import performance_check
from tests.command import HEAD, MLP, net

# Draws its weights without a seed and counts the batches that are asked for.
COUNTING = (
    net("return self.a(x)")
    + """
drawn = []

def eval_batches():
    for seed in range(100):
        drawn.append(seed)
        yield torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), None
"""
)

# torch.export cannot follow the branch in Gate; the layers on both sides of it can be captured.
GATED = (
    HEAD
    + """
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        if x.abs().sum() > 0:
            return self.inner(x)
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8, bias=False)
        self.gate, self.head = Gate(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gate(self.body(x)))


model = Net()
example_inputs = torch.linspace(0.5, 1.5, 32).reshape(4, 8)
"""
)
BRANCH = GATED.splitlines().index("        if x.abs().sum() > 0:") + 1


class Recorder:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.advanced: list[str] = []
        self.nodes: list[tuple[int, int]] = []

    def stage(self, name: str, steps: int | None = None) -> None:
        self.stages.append((name, steps))

    def node(self, done: int, nodes: int) -> None:
        self.nodes.append((done, nodes))

    def advance(self) -> None:
        self.advanced.append(self.stages[-1][0])


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test works in its own folder, and leaves sys.path and sys.modules as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(usercode, "_names", {})
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Run]:
    def convert(text: str, progress: Recorder | None = None, **settings: object) -> Run:
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        chosen = Settings(**settings)  # type: ignore[arg-type]
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return pipeline.convert("model.py", chosen, progress or Recorder(), work)

    return convert


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
def test_stages_are_announced_in_order(convert: Callable[..., Run]) -> None:
    progress = Recorder()
    convert(COUNTING, progress, calibrate=2, batches=3)
    calibrated = progress.nodes[: progress.nodes.index((1, progress.nodes[0][1]), 1)]
    assert calibrated == [(n, len(calibrated)) for n in range(1, len(calibrated) + 1)]
    assert [done for done, _ in progress.nodes].count(1) == 2 + 3  # a batch each
    assert progress.stages == [
        ("load the model", None),
        ("capture and check against eager FP32", None),
        ("calibrate", 2),
        ("plan and rewrite", None),
        ("compare with FP32", 3),
        ("measure time and memory", None),
        ("judge", None),
    ]
    assert progress.advanced == ["calibrate"] * 2 + ["compare with FP32"] * 3


@pytest.mark.slow
def test_settings_bound_the_batches(convert: Callable[..., Run]) -> None:
    report = convert(COUNTING, calibrate=2, batches=3).report
    assert report.plan.calibration_batches == 2
    assert report.inference is not None
    assert (report.inference.batches, report.inference.samples) == (3, 12)
    # The look at their sizes takes no more; each stage starts anew; those beyond are counted.
    assert sys.modules["model"].drawn[:8] == [0, 1, 2, 0, 1, 0, 1, 2]
    assert (report.inference.batches_given, report.inference.stopped) == (100, "asked")


@pytest.mark.slow
def test_without_eval_batches_the_example_inputs_are_the_only_one(
    convert: Callable[..., Run],
) -> None:
    progress = Recorder()
    report = convert(net("return self.a(x)"), progress).report
    assert progress.advanced == ["calibrate", "compare with FP32"]
    assert report.plan.calibration_batches == 1
    assert report.inference is not None
    assert (report.inference.batches, report.inference.metrics) == (1, ())
    assert report.inference.metrics_reason == "model defines no metrics"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_so(convert: Callable[..., Run]) -> None:
    environment = convert(MLP).report.environment
    assert (environment.device, environment.tf32) == ("cpu", None)
    assert environment.device_reason in (
        "auto: this PyTorch is built without CUDA",
        "auto: no usable GPU",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_the_gpu_and_says_so(convert: Callable[..., Run]) -> None:
    run = convert(MLP)
    environment = run.report.environment
    assert (environment.device, environment.tf32) == ("cuda", False)
    assert environment.device_reason == "auto: CUDA is available"
    assert environment.device_name == torch.cuda.get_device_name()
    assert run.report.verdict.status == "pass"
    assert {p.device.type for p in run.converted.parameters()} == {"cuda"}


def test_a_named_device_is_the_reason(convert: Callable[..., Run]) -> None:
    report = convert(MLP, device="cpu", dtype="bfloat16").report
    assert report.environment.device_reason == "--device cpu"
    assert (report.environment.dtype, report.plan.dtype, report.plan.device) == (
        "bfloat16",
        "bfloat16",
        "cpu",
    )


@pytest.mark.slow
def test_what_cannot_be_captured_is_listed_and_the_rest_converted(
    convert: Callable[..., Run],
) -> None:
    run = convert(GATED)
    report = run.report
    assert [(part.layer, part.location) for part in report.plan.uncaptured] == [
        ("", f"model.py:{BRANCH}"),
        ("gate", f"model.py:{BRANCH}"),
    ]
    assert {row.node: row.dtype for row in report.plan.decisions} == {
        "body/aten.linear#0": "float16",
        "gate.inner/aten.linear#0": "float16",
        "head/aten.linear#0": "float16",
    }
    checks = {check.name: check.status for check in report.verdict.checks}
    assert checks["capture.whole"] == "unchecked"
    assert report.verdict.status == "pass"
    # The branch is decided anew at each call: of zeros the inner layer is left out.
    original = run.converted.captured.model
    for x in (torch.ones(4, 8), torch.zeros(4, 8)):
        expected = original(x)
        error = (run.converted(x) - expected).norm() / expected.norm()
        assert 0 < error < 2e-3


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
    plan, model = pipeline.audit("model.py", Settings(), progress)
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
    assert traces(pipeline.audit, cache=False)[0] == 2
    assert not (tmp_path / "cache").exists()
    count, (first, _) = traces(pipeline.audit)
    assert count == 2
    count, (again, _) = traces(pipeline.audit)
    assert (count, again.eval) == (0, first.eval)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nop = "aten.gelu"\ncategory = "deny"\nreason = "mine"\n')
    count, (changed, _) = traces(pipeline.audit, rules=["default", str(rules)])
    assert count == 0
    assert "mine" in [decision.reason for decision in changed.eval]
    assert traces(pipeline.audit, dtype="bfloat16")[0] == 0
    count, run = traces(pipeline.convert, tmp_path)
    assert count == 0
    assert run.plan.eval == first.eval
    source.write_text(MODEL.format(seed=1))
    assert traces(pipeline.audit)[0] == 2


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
