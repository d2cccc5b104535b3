"""Reports to write: a small one whose every number is chosen, and one of any size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from amp_convert.attribute.results import Budget, NodeShare
from amp_convert.capture.captured import Uncaptured
from amp_convert.capture.fidelity import Fidelity
from amp_convert.plan.plan import Decision
from amp_convert.report import ModelInfo, RunReport, Unchecked, folder
from amp_convert.validate.inference.results import ArmCost, Divergence, MetricPair, NodeDivergence
from amp_convert.verdict.verdict import Check, Verdict
from tests.report.builders import (
    HOSTILE,
    decision,
    divergence_of,
    environment,
    fp32,
    output_error,
    plan_section,
    transformer_block,
)
from tests.report.exported import hostile_section, section
from tests.report.folders import swap_in_one_step
from tests.report.trained import hostile_parity, parity


@pytest.fixture
def small_report() -> RunReport:
    """Six nodes, one failed and one unchecked check, one NaN, one op in no rule."""
    nodes = (
        decision("features.0", "aten.conv2d", macs=9000, location="model.py:10"),
        fp32("features.1", "aten.batch_norm", location="model.py:11"),
        decision("classifier"),
        fp32(
            "",
            "aten.exp",
            rule="guard activation-range",
            reason="its input nears the largest float16",
            source="measured",
            evidence="abs max 71234 against 65504, 4 batches",
        ),
        fp32("", "aten.frobnicate", category="unknown", rule="unknown op", reason="in no rule"),
        decision("", "aten.argmax", category="none", dtype="int64", low=False, macs=0),
    )
    errors = (
        divergence_of(nodes[0], 2.5e-4, 2.5e-4),
        divergence_of(nodes[1], None, 3e-4),
        divergence_of(nodes[2], 1e-4, 5e-4),
        divergence_of(nodes[3], None, math.nan),
        divergence_of(nodes[5], None, None),
    )
    inference = Divergence(
        batches=2,
        samples=64,
        nodes=errors,
        outputs=(output_error("logits", 5e-4), output_error("label", 0.0, "int64")),
        autocast_outputs=(output_error("logits", 6e-4), output_error("label", 0.0, "int64")),
        autocast_reason="",
        metrics=(MetricPair("accuracy", 0.975, 0.96, 0.975, lower_is_better=False),),
        metrics_reason="",
        costs=(
            ArmCost("fp32", 2.0, 3 * 2**20, ""),
            ArmCost("autocast", 1.5, 2 * 2**20, ""),
            ArmCost("mixed", 1.25, 2 * 2**20, ""),
            ArmCost("frozen", 1.0, None, "peak memory is not measured on this platform"),
        ),
        reference_rel_l2=0.0,
        frozen_identical=True,
    )
    checks = (
        Check("outputs.rel_l2", "pass", 5e-4, 2e-2, "output logits: relative L2 error 0.0005"),
        Check("metrics.accuracy", "fail", 0.96, 0.96525, "0.96 mixed against 0.975 in FP32"),
        Check("fidelity.train", "unchecked", None, 1e-6, "the model file has no loss"),
        Check("training", "unchecked", None, None, "training parity is not in this version"),
    )
    budget = Budget(
        vectors=8,
        seed=0,
        samples=32,
        outputs=("logits",),
        left_out=("label",),
        predicted_rel_l2=5e-4,
        first_order_rel_l2=4.8e-4,
        measured_rel_l2=4.5e-4,
        floor_rel_l2=1e-7,
        doubts=(),
        nodes=(
            NodeShare(nodes[2].node, "classifier", nodes[2].op, "float16", 4e-4, 0.64, 1e-5, 5e-8),
            NodeShare(nodes[0].node, "features.0", nodes[0].op, "float16", 3e-4, 0.36, 2e-5, None),
        ),
    )
    return RunReport(
        amp_convert="0.1.0",
        model=ModelInfo(
            name="digits",
            source="digits.py",
            digest="sha256:0123",
            model_class="digits.Net",
            parameters=12345,
        ),
        created="2026-01-02T03:04:05Z",
        verdict=Verdict("fail", checks),
        environment=environment(),
        fidelity=(
            Fidelity("eval", "identical", True, None, True, 0.0, ""),
            Fidelity("train", "unchecked", None, None, None, 0.0, "the model file has no loss"),
        ),
        plan=plan_section(nodes, (Uncaptured("head", "a branch on a value", "model.py:50"),)),
        inference=inference,
        training=Unchecked(reason="training parity is not in this version"),
        onnx=Unchecked(reason="no ONNX model was asked for"),
        attribution=budget,
    )


@pytest.fixture
def trained_report(small_report: RunReport) -> RunReport:
    """`small_report` with training, whose every number is chosen as well."""
    checks = tuple(check for check in small_report.verdict.checks if check.name != "training")
    gradients = Check("training.gradients", "pass", 0.004, 0.1, "the gradients are FP32's")
    verdict = Verdict("fail", (*checks, gradients))
    return small_report.model_copy(update={"training": parity(), "verdict": verdict})


@pytest.fixture
def exported_report(small_report: RunReport) -> RunReport:
    """`small_report` with an ONNX file, whose every number is chosen as well."""
    return small_report.model_copy(update={"onnx": section()})


@pytest.fixture
def hostile_report(small_report: RunReport) -> RunReport:
    """`small_report` with every text that comes from a model replaced by a hostile one."""
    names = iter(HOSTILE * 8)
    nodes = tuple(
        fp32(name, name, module=name, location=name, reason=name, evidence=name, rule=name)
        for name in HOSTILE
    )
    checks = tuple(Check(name, "fail", name, name, name) for name in HOSTILE)
    assert small_report.inference is not None
    assert isinstance(small_report.attribution, Budget)
    inference = replace(
        small_report.inference,
        nodes=tuple(divergence_of(node, 1e-3, 1e-2) for node in nodes),
        outputs=tuple(output_error(name, 1e-3) for name in HOSTILE),
        metrics=tuple(MetricPair(name, 1.0, 0.5, None, False) for name in HOSTILE),
        autocast_outputs=(),
        autocast_reason=next(names),
    )
    model = ModelInfo(
        name=HOSTILE[0],
        source=HOSTILE[1],
        digest=HOSTILE[2],
        model_class=HOSTILE[3],
        parameters=1,
    )
    uncaptured = tuple(Uncaptured(name, name, name) for name in HOSTILE)
    return small_report.model_copy(
        update={
            "model": model,
            "verdict": Verdict("fail", checks),
            "inference": inference,
            "plan": plan_section(nodes, uncaptured),
            "training": hostile_parity(),
            "onnx": hostile_section(),
            "attribution": replace(
                small_report.attribution,
                outputs=HOSTILE,
                nodes=tuple(NodeShare(name, name, name, name, 1e-3, 0.1, 0.0) for name in HOSTILE),
            ),
        }
    )


@pytest.fixture
def make_report(small_report: RunReport) -> Callable[[int], RunReport]:
    """A report of a transformer with at least as many nodes as asked."""

    def make(count: int) -> RunReport:
        nodes: list[Decision] = []
        errors: list[NodeDivergence] = []
        for block in range(-(-count // 10)):
            for decided in transformer_block(f"bert.encoder.layer.{block}"):
                depth = len(nodes)
                wobble = 1 + 0.6 * math.sin(depth * 12.9898)
                local = 2.4e-4 * wobble if decided.low else 0.0
                nodes.append(decided)
                errors.append(divergence_of(decided, local, 3e-4 * wobble * (1 + depth) ** 0.5))
        assert small_report.inference is not None
        inference = replace(small_report.inference, nodes=tuple(errors))
        return small_report.model_copy(
            update={"inference": inference, "plan": plan_section(tuple(nodes))}
        )

    return make


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with golden/NAME; with UPDATE_GOLDEN=1 in the environment, rewrite that."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).with_name("golden") / name
        if os.environ.get("UPDATE_GOLDEN") == "1":
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        with path.open(encoding="utf-8", newline="") as file:
            assert text == file.read(), f"differs from {path}; UPDATE_GOLDEN=1 rewrites it"

    return check


@pytest.fixture(params=["one step", "two renames"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target, with the kernel's exchange and without."""
    if request.param == "two renames":
        monkeypatch.setattr(folder, "_exchange_in_one_step", lambda *paths: False)
    elif not swap_in_one_step(tmp_path):
        pytest.skip("this system has no RENAME_EXCHANGE")
    return tmp_path / "reports" / "model[1]"
