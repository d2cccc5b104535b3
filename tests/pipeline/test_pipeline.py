"""The stages of a run: their order, what settings bound, devices, fallback, and repeatability."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from amp_convert.pipeline import Run
from tests.command import HEAD, MLP, net
from tests.pipeline.pipeline_models import COUNTING, Recorder

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
        ("attribute the error", None),
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
