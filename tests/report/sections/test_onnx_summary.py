"""What a report says about the ONNX file and its runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from amp_convert.report import RunReport
from amp_convert.report.sections.onnx_node_summary import MAX_NODES, FirstNode, NodeRow
from amp_convert.report.sections.onnx_summary import (
    Fact,
    MetricRow,
    OnnxSummary,
    RunRow,
    onnx_summary,
)
from tests.report.exported import clean_parity, label, model, node, output, parity, run, section


def _summary(report: RunReport, *args: object, **changes: object) -> OnnxSummary:
    onnx = section(*args, **changes)  # type: ignore[arg-type]
    found = onnx_summary(report.model_copy(update={"onnx": onnx}))
    assert found is not None
    return found


def test_without_an_export_there_is_nothing_to_say(small_report: RunReport) -> None:
    assert onnx_summary(small_report) is None


def test_the_file_and_what_ran_it(small_report: RunReport) -> None:
    found = _summary(small_report)
    assert found.title == "model.onnx, 3 MiB, opset 20"
    assert found.remarks == ()
    assert found.facts == (
        Fact("file", "model.onnx, 3 MiB with the weights in model.onnx.data", detail=True),
        Fact("opset", "20, written by amp-convert 0.1.0 with PyTorch 2.13.0", detail=True),
        Fact("inputs", "image float32 (batch, 1, 8, 8)"),
        Fact("outputs", "logits float32 (batch, 10), label int64 (batch)"),
        Fact("their dtypes", "the model's", detail=True),
        Fact("nodes", "12: 7 float16, 3 float32, 2 int64"),
        Fact("casts", "3 between floating point dtypes"),
        Fact("runtime", "onnxruntime 1.32.0 on CPUExecutionProvider"),
        Fact("batches", "2 batches, 64 samples", detail=True),
        Fact("node by node", "4 nodes on 1 batch; 1 more is constant in the file", detail=True),
        Fact(
            "float16 nodes",
            "1 as written, 5 in float32 between casts, 2 rewritten into other nodes",
        ),
    )


def test_other_files_are_described_as_they_are(small_report: RunReport) -> None:
    changed = model(
        external_data=None, bytes=512, io_types="low", inputs=(), nodes_by_dtype={"": 1},
        lost_state=("norm.running_mean", "cache"),
    )  # fmt: skip
    found = _summary(small_report, changed, ran={}, ran_reason="")
    facts = {fact.name: fact.value for fact in found.facts}
    assert facts["file"] == "model.onnx, 512 bytes"
    assert facts["inputs"] == "none"
    assert facts["their dtypes"] == "float16 for the model's FP32"
    assert facts["nodes"] == "12: 1 of no known dtype"
    assert facts["float16 nodes"] == "none"
    assert found.remarks == (
        "the model writes to norm.running_mean, cache, which a file cannot: its runs all start "
        "afresh",
    )


def test_each_run_has_a_row(small_report: RunReport) -> None:
    assert _summary(small_report).runs == (
        RunRow("FP32 file", 2, "1.00e-07", "", "", "", "", "", "unchecked", ()),
        RunRow("unoptimised", 2, "5.00e-04", "8.00e-03", "logits", "4.00e-03", "1.00e-02", "yes",
               "pass", ()),
        RunRow(
            "optimised", 2, "5.00e-04", "8.00e-02", "logits", "4.00e-02", "1.00e-02", "no",
            "fail",
            (
                "runs only without SimplifiedLayerNormFusion: no such kernel",
                "label: 3 of 640 elements differ",
            ),
        ),
        RunRow("node by node", 1, "5.00e-04", "0", "logits", "0", "1.00e-02", "yes", "pass", ()),
    )  # fmt: skip


def test_a_run_that_failed_agrees_with_nothing(small_report: RunReport) -> None:
    failed = run("unoptimised", failure="bad allocation", batches=1)
    runs = (parity().runs[0], failed, *parity().runs[2:])
    found = _summary(small_report, runs=runs, ran={}, ran_reason="bad allocation")
    assert found.runs[1] == RunRow(
        "unoptimised", 1, "", "", "", "", "", "unknown", "unchecked", ("failed: bad allocation",)
    )
    assert found.facts[-1].value == "not known how they run: bad allocation"


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        # The nearest to its limit, whatever its size.
        ((output(0.5, 100.0, name="a"), output(0.009, name="b")), ("b", "yes")),
        # One that does not agree, even if another has no limit.
        ((output(0.5, None, agrees=None, name="a"), output(0.1, agrees=False, name="b")),
         ("b", "no")),
        # One that is not known to agree.
        ((output(0.001, name="a"), output(0.0, None, agrees=None, name="b")), ("b", "unknown")),
        # NaN is beyond any limit, and a NaN for a limit allows nothing.
        ((output(0.02, agrees=False, name="a"), output(math.nan, agrees=False, name="b")),
         ("b", "no")),
        ((output(0.02, agrees=False, name="a"), output(0.0, math.nan, agrees=False, name="b")),
         ("b", "no")),
        # Integers have no distance.
        ((label(1),), ("", "no")),
        ((), ("", "unknown")),
    ],
)  # fmt: skip
def test_the_output_that_decides_is_the_one_shown(
    small_report: RunReport, outputs: tuple[object, ...], shown: tuple[str, str]
) -> None:
    runs = (*parity().runs[:2], run("optimised", *outputs), parity().runs[3])  # type: ignore[arg-type]
    row = _summary(small_report, runs=runs).runs[2]
    assert (row.output, row.agrees) == shown


def test_metrics_name_the_run_that_they_are_of(small_report: RunReport) -> None:
    metric = replace(parity().metrics[0], name="error", lower_is_better=True)
    found = _summary(small_report, metrics=(metric,))
    assert found.metrics == (MetricRow("error (lower is better)", "0.975", "0.96", "0.95"),)
    assert found.metrics_text == "The metrics; ONNX Runtime's are those of the optimised run"
    assert _summary(small_report, **clean_parity()).metrics_text == ""


_CONV = NodeRow(
    "features.0", "aten.conv2d", "float16", "model.py:10", "Conv", "in float32", 1e-6, 1e-6, False
)
_NORM = NodeRow(
    "features.1", "aten.batch_norm", "float32", "model.py:11", "Mul, Add", "", 2e-7, 3e-6, False
)
_LINEAR = NodeRow(
    "classifier", "aten.linear", "float16", "model.py:41", "Gemm", "in float32", 4e-3, 5e-3, True
)


def test_the_first_nodes_have_the_place_of_the_plan(small_report: RunReport) -> None:
    assert _summary(small_report).firsts == (
        FirstNode("first to part", _LINEAR, ""),
        FirstNode("first to drift", _NORM, ""),
        FirstNode("first in float32", _CONV, ""),
    )


def test_no_first_node_is_none(small_report: RunReport) -> None:
    assert [(f.node, f.text) for f in _summary(small_report, **clean_parity()).firsts] == [
        (None, "none")
    ] * 3


def test_what_no_run_showed_is_not_known(small_report: RunReport) -> None:
    runs = (
        *parity().runs[:1],
        run("unoptimised", failure="no session"),
        parity().runs[2],
        run("node by node", failure="no kernel", batches=0),
    )
    changes = clean_parity() | {"runs": runs, "nodes": (), "ran": {}, "ran_reason": "no session"}
    assert [(f.node, f.text) for f in _summary(small_report, **changes).firsts] == [
        (None, "not known: no kernel"),
        (None, "not known: no kernel"),
        (None, "not known: no session"),
    ]


def test_many_operators_are_counted_and_cut(small_report: RunReport) -> None:
    ops = ("Shape", "Slice", "Slice", "MatMul", "Add", "Softmax", "MatMul", "IsNaN", "Where")
    row = _summary(small_report, nodes=(node("a", "aten.sdpa", 0.5, 0.5, onnx_ops=ops),)).worst[0]
    assert row.onnx_ops == "Shape, Slice ×2, MatMul ×2, Add, Softmax and 2 more ops"


def test_the_worst_nodes_come_by_their_local_error(small_report: RunReport) -> None:
    assert _summary(small_report).worst == (_LINEAR, _CONV, _NORM)
    many = [node(f"l{i}", "aten.add", i / 100, None) for i in range(1, 11)]
    many += [node("nan", "aten.add", math.nan, None), node("none", "aten.add", None, None)]
    worst = _summary(small_report, nodes=tuple(many)).worst
    assert [row.layer for row in worst] == ["nan", *(f"l{i}" for i in range(10, 3, -1))]
    assert len(worst) == MAX_NODES
    assert {row.location for row in worst} == {""}
