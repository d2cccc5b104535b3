"""What a reader wants first."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from amp_convert.capture.captured import Uncaptured
from amp_convert.report import RunReport
from amp_convert.report.records import NodeRecord
from amp_convert.report.sections.gaps import gaps
from amp_convert.report.sections.grouping import fp32_groups, layer_patterns, layers_text, ops_text
from amp_convert.report.sections.summary import (
    comparison,
    severity,
    tolerance,
    verdict_sentence,
    worst_layers,
    worst_output,
)
from amp_convert.validate.inference.results import ArmCost
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.verdict import Verdict
from tests.report.builders import decision, divergence_of, fp32, output_error
from tests.report.trained import arm_of, over_seeds, parity, run_of


def _with_errors(report: RunReport, errors: dict[str, list[float | None]]) -> RunReport:
    assert report.inference is not None
    rows = [
        replace(divergence_of(decision(layer, f"aten.op{i}"), None, None), accumulated_rel_l2=value)
        for layer, values in errors.items()
        for i, value in enumerate(values)
    ]
    return report.model_copy(update={"inference": replace(report.inference, nodes=tuple(rows))})


def test_severity_orders_errors() -> None:
    shuffled = [math.inf, 0.0, math.nan, 1e30, None, 1e-9]
    assert str(sorted(shuffled, key=severity)) == "[None, 0.0, 1e-09, 1e+30, inf, nan]"


def test_a_layer_is_as_bad_as_its_worst_node(small_report: RunReport) -> None:
    report = _with_errors(
        small_report,
        {"a": [1e-3, 5e-3, 5e-3], "b": [math.inf], "c": [math.nan], "d": [0.0], "e": [None, 9e-3]},
    )
    worst = worst_layers(report)
    assert [(row.layer, row.op) for row in worst] == [
        ("c", "aten.op0"),
        ("b", "aten.op0"),
        ("e", "aten.op1"),
        ("a", "aten.op1"),
    ]
    assert [row.layer for row in worst_layers(report, limit=2)] == ["c", "b"]


def test_the_worst_output_is_a_floating_one() -> None:
    outputs = [
        output_error("label", 9.0, "int64"),
        output_error("a", 1e-3),
        output_error("b", math.nan, "bfloat16"),
        output_error("c", 5.0),
    ]
    worst = worst_output(outputs)
    assert worst is not None
    assert worst.name == "b"
    assert worst_output(outputs[:1]) is None


def test_the_comparison_has_one_row_a_quantity(small_report: RunReport) -> None:
    rows = {
        row.quantity: (row.fp32, row.autocast, row.mixed, row.frozen)
        for row in comparison(small_report)
    }
    assert rows == {
        "output error": ("0", "6.00e-04", "5.00e-04", ""),
        "accuracy": ("0.975", "0.975", "0.96", ""),
        "time per forward": ("2 ms", "1.5 ms", "1.25 ms", "1 ms"),
        "peak memory": ("3 MiB", "2 MiB", "2 MiB", ""),
    }


def test_the_tolerance_is_that_of_the_output_check(small_report: RunReport) -> None:
    assert tolerance(small_report) == 2e-2
    none = small_report.model_copy(update={"verdict": Verdict("inconclusive", ())})
    assert tolerance(none) is None


def test_the_sentence_counts_checks(small_report: RunReport) -> None:
    assert verdict_sentence(small_report) == "1 of 4 checks passed, 1 failed, 2 not checked"


def test_gaps_name_all_that_was_not_checked_once(small_report: RunReport) -> None:
    assert [(gap.what, gap.reason) for gap in gaps(small_report)] == [
        ("fidelity.train", "the model file has no loss"),
        ("training", "training parity is not in this version"),
        ("onnx", "no ONNX model was asked for"),
        ("cost of the frozen arm", "peak memory is not measured on this platform"),
        ("aten.frobnicate, 1 node", "aten.frobnicate is in no rule, so it stays float32"),
        ("head", "not captured, stays eager float32: a branch on a value (model.py:50)"),
    ]


def test_gaps_name_what_was_not_looked_at_in_training(trained_report: RunReport) -> None:
    def found(training: TrainingParity) -> list[tuple[str, str]]:
        report = trained_report.model_copy(
            update={"training": training, "verdict": Verdict("pass", ())}
        )
        return [(gap.what, gap.reason) for gap in gaps(report)][:-4]

    seeds = (
        "training over seeds",
        "one pair was trained; --seeds tests whether mixed is worse over several",
    )
    assert found(parity()) == [seeds]
    assert found(parity(**over_seeds([0.9] * 5, [0.9] * 5))) == []
    losses = (arm_of("fp32", [1.0], metrics={"loss": 1.0}), arm_of("mixed", [1.0]))
    banned = arm_of("autocast", [], note="the original fails under torch.autocast: banned")
    assert found(parity(run=run_of(*losses, banned))) == [
        ("training of the autocast arm", "the original fails under torch.autocast: banned"),
        (
            "metrics after training",
            "the model file gives no metrics, so training is judged by its loss alone",
        ),
        seeds,
    ]


def test_gaps_of_one_reason_are_one_entry(small_report: RunReport) -> None:
    inference = small_report.inference
    assert inference is not None
    plan = small_report.plan.model_copy(
        update={"unknown_ops": {}, "uncaptured": (Uncaptured("", "why", ""),)}
    )
    costs = (
        ArmCost("autocast", None, None, "no GPU"),
        ArmCost("frozen", None, None, "no GPU"),
        ArmCost("fp32", 1.0, 1, "median of 5"),
    )
    report = small_report.model_copy(
        update={
            "inference": replace(inference, costs=costs),
            "verdict": Verdict("pass", ()),
            "plan": plan,
        }
    )
    assert [(gap.what, gap.reason) for gap in gaps(report)] == [
        ("training", "training parity is not in this version"),
        ("onnx", "no ONNX model was asked for"),
        ("cost of the autocast arm, cost of the frozen arm", "no GPU"),
        ("(top level)", "not captured, stays eager float32: why"),
    ]


def test_fp32_groups_are_in_order_of_multiply_adds_and_nodes() -> None:
    kept = (
        fp32("p", "aten.add", macs=500, reason="follows exp"),
        fp32("block.0.norm", "aten.layer_norm"),
        fp32("block.1.norm", "aten.layer_norm", evidence="abs max 3"),
        fp32("head", "aten.mm", macs=250, rule="unknown op", reason="in no rule"),
        decision("low", macs=250),
        fp32("index", "aten.argmax", category="none"),
    )
    groups = fp32_groups(map(NodeRecord.of, kept))
    assert [(group.rule, group.nodes, group.macs_share) for group in groups] == [
        ("op aten.add", 1, 0.5),
        ("unknown op", 1, 0.25),
        ("op aten.layer_norm", 2, 0.0),
    ]
    norms = groups[2]
    assert norms.evidence == "abs max 3"
    assert norms.ops == (("aten.layer_norm", 2),)
    assert layers_text(norms.layers) == "block.*.norm (2 layers)"


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (["a.0.b", "a.1.b", "a.10.b", "a.1.b"], "a.*.b (3 layers)"),
        (["a.0", "a.0", "c"], "a.0, c"),
        (["0", "1"], "* (2 layers)"),
        (["conv1", "conv2"], "conv1, conv2"),
        (["", "x"], "(top level), x"),
        (["a", "b", "c", "d.1", "d.2"], "d.* (2 layers), a and 2 more"),
    ],
)
def test_layers_that_differ_in_an_index_share_a_pattern(layers: list[str], text: str) -> None:
    assert layers_text(layer_patterns(layers)) == text


def test_ops_are_counted_and_cut() -> None:
    ops = [("aten.mean", 12), ("aten.pow", 1), ("aten.sum", 1), ("aten.exp", 1)]
    assert ops_text(ops) == "aten.mean ×12, aten.pow, aten.sum and 1 more op"
