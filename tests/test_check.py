"""`amp.check`: the whole job without a file and without a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.capture import export
from amp_convert.core.errors import environment_problem
from amp_convert.report.sections.gaps import gaps
from tests.command import TRAINED, write
from tests.command import amp as command

X = torch.linspace(-1, 1, 64).reshape(8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(3):
        inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        yield inputs, inputs[:, :3].argmax(1)


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"accuracy": float((outputs.argmax(1) == target).float().mean())}


@pytest.mark.slow
def test_it_gives_the_report_the_verdict_and_the_converted_model() -> None:
    model = net()
    run = amp.check(model, X, eval_batches=batches, metrics=accuracy, name="points")
    assert isinstance(run, amp.Run)
    assert run.verdict.status == "pass"
    assert run.verdict is run.report.verdict
    assert (run.report.model.name, run.report.inference.batches) == ("points", 3)
    assert [m.name for m in run.report.inference.metrics] == ["accuracy"]
    assert run.converted.plan is run.plan
    assert torch.equal(run.converted(X), amp.convert(model, X, calibration=[X])(X))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 10}, "train_batches"),
        ({"margin": 0.1}, "--margin does nothing with one seed"),
        ({"seeds": 2}, "train_batches"),
        ({"checkpoint_every": 3}, "--checkpoint-every does nothing without a checkpoint"),
        ({"fp32_baseline": "x.json"}, "--fp32-seeds does nothing with one seed"),
        ({"steps": 10, "train": False}, "--no-train and --steps were both given"),
        ({"opset": 18}, "there is no folder for the ONNX file"),
        ({"baseline": "nowhere.json"}, "nowhere.json"),
        ({"device": "cpu"}, "check() runs where the model is"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(amp.UsageError) as caught:
        amp.check(net(), X, **settings)
    assert said in str(caught.value)


@pytest.mark.slow
def test_a_baseline_gates_the_result(tmp_path: Path) -> None:
    from amp_convert.gate.baseline import baseline_of

    def checked(**settings: Any) -> amp.Run:
        return amp.check(net(), X, eval_batches=batches, metrics=accuracy, name="net", **settings)

    run = checked()
    assert (run.gated, run.exit_code) == (None, 0)
    baseline = baseline_of(run.report)
    file = tmp_path / "baseline.json"
    file.write_text(baseline.model_dump_json())
    again = checked(baseline=file)
    assert again.gated is not None
    assert (again.gated.status, again.exit_code) == ("pass", 0)
    was = baseline.metrics["accuracy"]
    better = {"accuracy": was.model_copy(update={"mixed": was.mixed + 0.5})}
    file.write_text(baseline.model_copy(update={"metrics": better}).model_dump_json())
    worse = checked(baseline=file)
    assert worse.verdict.status == "pass"
    assert worse.gated is not None
    assert (worse.gated.status, worse.exit_code) == ("fail", 1)


def test_training_and_settings() -> None:
    run = amp.check(
        net(),
        X,
        dtype=torch.bfloat16,
        train_batches=lambda seed: batches(),
        loss=F.cross_entropy,
        optimizer=torch.optim.SGD,
        steps=3,
        rules=["default"],
    )
    assert run.report.training.run.steps == 3
    assert run.report.training.optimizer.startswith("SGD")
    assert run.report.environment.dtype == "bfloat16"


def test_the_folder_is_that_of_the_command(tmp_path: Path) -> None:
    out = tmp_path / "report"
    run = amp.check(net(), X, eval_batches=list(batches()), out=out)
    assert {"report.json", "layers.csv", "plan.toml", "report.html"} <= {
        entry.name for entry in out.iterdir()
    }
    assert run.files == ()


@pytest.mark.slow
def test_the_command_is_a_thin_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks in the same order, whoever asks; a time is another each time."""
    write(tmp_path, TRAINED)
    by_command = command(tmp_path, "model.py", "--steps", "5", "--json").json
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict[str, Any] = {}
    exec((tmp_path / "model.py").read_text(), scope)
    run = amp.check(
        scope["build_model"](),
        scope["example_inputs"](),
        eval_batches=scope.get("eval_batches"),
        metrics=scope.get("metrics"),
        train_batches=scope["train_batches"],
        loss=scope["loss"],
        optimizer=scope.get("optimizer"),
        lower_is_better=scope.get("lower_is_better", ()),
        steps=5,
    )
    mine = [(c.name, c.status, c.value) for c in run.verdict.checks]
    theirs = [(c["name"], c["status"], c["value"]) for c in by_command["verdict"]["checks"]]
    assert [name for name, *_ in mine] == [name for name, *_ in theirs]
    timed = "performance.inference"
    mine, theirs = ([row for row in rows if row[0] != timed] for rows in (mine, theirs))
    assert mine == theirs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": torch.float32}, "dtype is 'float32' (at settings). Give float16 or bfloat16."),
        ({"stps": 3}, "unknown setting stps (at settings). Did you mean steps?"),
        ({"steps": 0}, "steps is 0 (at settings). Give a whole number from 1 to 10**9."),
        ({"eval_batches": batches()}, "eval_batches can be gone through only once. Give a list"),
        ({"onnx": True}, "there is no folder for the ONNX file. Give one."),
    ],
)
def test_wrong_calls(given: dict[str, Any], message: str) -> None:
    with pytest.raises(amp.UsageError) as caught:
        amp.check(net(), X, **given)
    assert str(caught.value).startswith(message)


def test_the_log_tells_the_stages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amp_convert"):
        amp.check(net(), X)
    told = [
        record.message for record in caplog.records if record.name == "amp_convert.core.progress"
    ]
    assert told[:3] == ["capture and check against eager FP32", "calibrate", "plan and rewrite"]
    assert told[-1] == "judge"


class Branching(nn.Module):
    """Its second half depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h if h.sum() > 0 else -h)


@pytest.mark.slow
def test_the_log_tells_what_stays_eager(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amp_convert"):
        amp.convert(Branching(), X)
    told = " ".join(record.message for record in caplog.records)
    assert "the model cannot be captured whole" in told
    assert "the top level stays eager" in told


@pytest.mark.slow
def test_without_a_listener_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    amp.convert(Branching(), X)
    assert "amp_convert" not in capfd.readouterr().err


# --- what the environment lacks is nobody's fault ------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory ran out: MemoryError. Give smaller batches, or a machine with"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out: CUDA out of memory."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "memory ran out: [enforce fail]",
        ),
        (OSError(28, "No space left on device", "/data/x"), "the disk is full (at /data/x)."),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "the package timm is missing"),
    ],
)
def test_what_is_lacking_is_said(error: Exception, message: str) -> None:
    wrapped = ValueError("far out")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        found = environment_problem(each)
        assert found is not None
        assert str(found).startswith(message)
        assert found.exit_code == 2


def test_other_errors_are_no_problem_of_the_environment() -> None:
    assert environment_problem(RuntimeError("shapes cannot be multiplied")) is None
    assert environment_problem(OSError(2, "No such file")) is None


class Hungry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return self.linear(x)


def test_memory_that_runs_out_in_capture_is_not_an_unsupported_model() -> None:
    with pytest.raises(amp.AmpConvertError, match="memory ran out") as caught:
        amp.convert(Hungry(), X)
    assert caught.value.exit_code == 2


def test_sizes_that_are_fixed_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = export._program

    def refuses(*args: Any, vary: Any, words: Any) -> Any:
        if vary is not None:
            raise ValueError("a guard on s77")
        return program(*args, vary=vary, words=words)

    monkeypatch.setattr(export, "_program", refuses)
    with caplog.at_level(logging.WARNING, logger="amp_convert"):
        run = amp.check(net(), X)
    why = "PyTorch cannot trace it (ValueError: a guard on s77)"
    assert [(f.layer, f.mode, f.reason) for f in run.report.fixed_sizes] == [
        ("", "eval", why),
        ("", "train", why),
    ]
    assert "sizes are fixed in eval mode" in caplog.text
    told = {gap.what: gap.reason for gap in gaps(run.report)}
    assert any("other sizes in eval mode" in what and why in told[what] for what in told)
