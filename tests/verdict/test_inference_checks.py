"""Each check other than those on the outputs, from both sides of its limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.capture.captured import Uncaptured
from amp_convert.verdict.thresholds import metric_holds, metric_limit
from tests.evidence import (
    FIRST,
    LAST,
    NODES,
    check,
    decision,
    divergence,
    fidelity,
    in_fp32,
    metric,
    node_error,
    output,
    plan,
    verdict,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({}, "pass"),
        ({"gradients": None}, "pass"),
        ({"status": "different", "outputs": False, "max_rel_l2": 9e-7}, "pass"),
        ({"status": "different", "outputs": False, "max_rel_l2": 1.1e-6}, "fail"),
        ({"status": "different", "outputs": False, "max_rel_l2": NAN}, "fail"),
        ({"status": "different", "outputs": False, "max_rel_l2": INF}, "fail"),
        # A difference that the relative error does not show, such as an integer buffer's.
        ({"status": "different", "buffers": False, "max_rel_l2": 0.0}, "fail"),
        # Rows that contradict themselves are not believed.
        ({"outputs": False}, "fail"),
        ({"gradients": False}, "fail"),
        ({"max_rel_l2": NAN}, "fail"),
        ({"status": "unchecked", "outputs": None, "reason": "cannot be exported"}, "unchecked"),
        ({"outputs": None}, "unchecked"),
    ],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fidelity(mode: str, row: dict[str, Any], status: str) -> None:
    rows = [fidelity(m, **(row if m == mode else {})) for m in ("eval", "train")]
    found = verdict(rows=rows)
    assert check(f"fidelity.{mode}", found).status == status
    unchecked = "inconclusive" if mode == "eval" else "pass"
    assert found.status == {"pass": "pass", "fail": "fail", "unchecked": unchecked}[status]


def test_fidelity_within_tolerance_says_that_it_is_not_bit_identical() -> None:
    rows = (fidelity("eval", status="different", outputs=False, max_rel_l2=5e-7),)
    one = check("fidelity.eval", verdict(rows=rows))
    assert one.reason.startswith("not bit-identical")
    assert one.value == 5e-7


def test_missing_fidelity_is_unchecked() -> None:
    found = verdict(rows=(fidelity("train"),))
    assert found.status == "inconclusive"
    assert check("fidelity.eval", found).status == "unchecked"


def test_the_worst_of_several_fidelity_rows_speaks() -> None:
    bad = fidelity("eval", status="different", outputs=False, max_rel_l2=0.5)
    assert check("fidelity.eval", verdict(rows=(fidelity(), bad, fidelity()))).status == "fail"


def test_parts_left_eager_stay_visible_and_do_not_block() -> None:
    planned = plan(uncaptured=(Uncaptured("roi", "a branch on a value", "model.py:50"),))
    found = verdict(planned=planned)
    one = check("capture.whole", found)
    assert (found.status, one.status, one.value) == ("pass", "unchecked", 1)
    assert "roi: a branch on a value" in one.reason


def test_a_plan_that_converts_nothing_fails_unless_the_rules_are_fp32() -> None:
    nodes = (in_fp32(FIRST), in_fp32(LAST, rule="guard activation-range"))
    exact = divergence(
        outputs=(output(rel_l2=0.0, max_abs_err=0.0, cosine=1.0, slices=()),),
        nodes=(node_error(FIRST),),
    )
    found = verdict(exact, planned=plan(*nodes))
    one = check("plan.low_precision", found)
    assert found.status == one.status == "fail"
    assert "by rule: op aten.softmax (1), guard activation-range (1)." in one.reason
    assert "--rules fp32" in one.reason
    for rules in (("fp32",), ("fp32.toml",)):
        assert verdict(exact, planned=plan(*nodes, rules=rules)).status == "pass"
    assert verdict(exact, planned=plan(*nodes, rules=("fp32.toml", "my.toml"))).status == "fail"


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"rel_l2": 1e-9}, "outputs.rel_l2"),
        ({"max_abs_err": 1e-9}, "outputs.max_abs"),
        ({"cosine": 0.99999}, "outputs.cosine"),
        ({"dtype": "int64", "mismatches": 1}, "outputs.agreement"),
    ],
)
def test_a_plan_that_converts_nothing_must_be_exact(changes: dict[str, Any], failing: str) -> None:
    planned = plan(in_fp32(FIRST), rules=("fp32.toml",))
    same = output(rel_l2=0.0, max_abs_err=0.0, cosine=1.0, slices=(), noise_rel_l2=None)
    same = replace(same, noise_max_abs=None)
    found = verdict(
        divergence(outputs=(same, replace(same, name="other", **changes))), planned=planned
    )
    assert [one.name for one in found.checks if one.status == "fail"] == [failing]


def test_a_node_that_overflows_fails_and_is_named() -> None:
    nodes = (NODES[0], replace(NODES[1], nonfinite=2), replace(NODES[2], nonfinite=7))
    one = check("nodes.finite", verdict(divergence(nodes=nodes)))
    assert (one.status, one.value) == ("fail", 2)
    assert f"first {NODES[1].node}, worst {LAST} with 7 elements" in one.reason


@pytest.mark.parametrize("field", ["local_rel_l2", "accumulated_rel_l2"])
def test_a_node_whose_error_is_nan_fails(field: str) -> None:
    nodes = (*NODES[:2], replace(NODES[2], **{field: NAN}))
    assert check("nodes.finite", verdict(divergence(nodes=nodes))).status == "fail"
    # Against a reference of zeros any error is infinitely large; that is no overflow.
    nodes = (*NODES[:2], replace(NODES[2], **{field: INF}))
    assert check("nodes.finite", verdict(divergence(nodes=nodes))).status == "pass"


def test_a_low_node_without_a_measurement_is_unchecked() -> None:
    found = verdict(divergence(nodes=NODES[:2]))
    one = check("nodes.finite", found)
    assert (found.status, one.status) == ("inconclusive", "unchecked")
    assert one.reason.startswith("1 node(s) got no element on any of the ")
    assert f", first {LAST}: give some early that reach them" in one.reason


def test_a_plan_without_nodes_has_no_finite_node() -> None:
    planned = replace(plan(), eval=())
    assert check("nodes.finite", verdict(planned=planned)).status == "unchecked"


@pytest.mark.parametrize(
    ("fp32", "mixed", "lower", "status"),
    [
        (0.8, 0.792, False, "pass"),
        (0.8, 0.7919, False, "fail"),
        (0.8, 0.808, False, "pass"),
        (2.0, 2.02, True, "pass"),
        (2.0, 2.021, True, "fail"),
        # Too good to come from precision.
        (0.8, 0.9, False, "inconclusive"),
        (2.0, 1.0, True, "inconclusive"),
        # A negative metric, such as a log likelihood, loses by going down.
        (-50.0, -50.5, False, "pass"),
        (-50.0, -50.6, False, "fail"),
        # A small metric has a small tolerance, and one of 0 has none.
        (0.0, 0.0, True, "pass"),
        (0.0, 1e-9, True, "fail"),
        (1e-5, 1.011e-5, True, "fail"),
        (1e-5, -8e-5, False, "fail"),
        (0.8, NAN, False, "fail"),
        # What FP32 has no number for is no fault of the mixed model's.
        (NAN, 0.8, False, "inconclusive"),
        (NAN, NAN, True, "inconclusive"),
        (INF, INF, False, "inconclusive"),
        (INF, 1.0, True, "inconclusive"),
        (0.8, INF, False, "fail"),
    ],
)
def test_metric_tolerance(fp32: float, mixed: float, lower: bool, status: str) -> None:
    pair = metric("score", fp32=fp32, mixed=mixed, lower_is_better=lower)
    found = verdict(divergence(metrics=(metric(), pair)))
    assert check("metrics.score", found).status == status.replace("inconclusive", "unchecked")
    assert found.status == status


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"mixed": 0.96, "standard_error": 1e-3}, "fail", "0.96 mixed"),
        ({"mixed": 0.96, "standard_error": 0.01}, "unchecked", "more eval batches are needed"),
        ({"mixed": 0.99, "standard_error": 0.01}, "pass", ""),
        ({"mixed": 0.96, "standard_error": NAN}, "fail", ""),
        ({"unpaired": 2}, "fail", "on 2 batch(es) only one of the two has it"),
        ({"doubt": "stateful"}, "unchecked", "another value when it is called again"),
        ({"doubt": "constant"}, "unchecked", "the same for outputs that are certainly wrong"),
        ({"doubt": "constant", "mixed": 0.9}, "fail", ""),
        # Both signs: a value near to 0 is no scale, but how much it varies is.
        ({"fp32": 1e-4, "mixed": -9e-3, "spread": 1.0}, "pass", ""),
        ({"fp32": 1e-4, "mixed": -1.1e-2, "spread": 1.0}, "fail", ""),
    ],
)
def test_what_a_metric_shows(changes: dict[str, Any], status: str, says: str) -> None:
    pair = metric(**changes)
    one = check("metrics.accuracy", verdict(divergence(metrics=(pair,))))
    assert one.status == status
    assert says in one.reason


@pytest.mark.parametrize(
    ("changes", "status", "found"),
    [
        ({}, "pass", "pass"),
        ({"stopped": "time", "batches_given": 9}, "unchecked", "inconclusive"),
        ({"stopped": "time", "batches_given": None}, "unchecked", "inconclusive"),
        ({"stopped": "asked", "batches_given": 9}, "unchecked", "pass"),
    ],
)
def test_batches_that_were_not_seen(changes: dict[str, Any], status: str, found: str) -> None:
    given = verdict(divergence(**changes))
    one = check("batches.all", given)
    assert (one.status, given.status) == (status, found)
    if changes.get("batches_given"):
        assert one.reason.startswith("2 of 9 batches were seen")


def test_placeholders_are_no_evidence() -> None:
    found = verdict(divergence(same_inputs=True))
    assert found.status == "inconclusive"
    assert "Give real example_inputs or eval_batches" in check("batches.inputs", found).reason
    exact = (output(rel_l2=0.0, max_abs_err=0.0, cosine=1.0, slices=()),)
    run = divergence(same_inputs=True, outputs=exact, nodes=NODES[:1])
    nothing = plan(in_fp32(FIRST), rules=("fp32.toml",))
    assert check("batches.inputs", verdict(run, planned=nothing)).status == "pass"


def test_a_plan_that_converts_next_to_nothing_is_no_conversion() -> None:
    planned = plan(decision(FIRST, macs=2), in_fp32(LAST, macs=9998))
    found = verdict(divergence(nodes=NODES[:1]), planned=planned)
    one = check("plan.low_precision", found)
    assert (found.status, one.status, one.value) == ("inconclusive", "unchecked", 2e-4)
    assert "0.02% of the multiply-adds" in one.reason
    eager = replace(plan(decision(FIRST, macs=2)), eager_macs=9998)
    assert check("plan.low_precision", verdict(planned=eager)).status == "unchecked"


def test_what_a_buffer_adds_up_was_not_looked_at() -> None:
    rows = (output(), output("buffer total"))
    one = check("buffers.kept", verdict(divergence(outputs=rows, autocast_outputs=rows)))
    assert (one.status, one.required) == ("unchecked", False)
    assert "buffer total" in one.reason


def test_changed_routes_are_named() -> None:
    nodes = (*NODES[:2], replace(NODES[2], choices_changed=0.25))
    found = verdict(divergence(nodes=nodes))
    one = check("nodes.choices", found)
    assert (found.status, one.status, one.value) == ("pass", "unchecked", 0.25)
    assert "25.00% of its choices: routes changed" in one.reason
    same = (*NODES[:2], replace(NODES[2], choices_changed=0.0))
    assert check("nodes.choices", verdict(divergence(nodes=same))).status == "pass"


@pytest.mark.parametrize(("supplied", "status"), [(True, "inconclusive"), (False, "pass")])
def test_metrics_that_were_not_computed(supplied: bool, status: str) -> None:
    run = divergence(metrics=(), metrics_reason="the model file has no metrics")
    found = verdict(run, metrics_supplied=supplied)
    one = check("metrics", found)
    assert (found.status, one.status) == (status, "unchecked")
    assert one.reason == "the model file has no metrics"


def test_no_tolerance_means_no_loss() -> None:
    assert metric_limit(0.0, 0.0, lower_is_better=True) == 0.0
    assert metric_holds(0.5, metric_limit(0.5, 0.0, lower_is_better=False), lower_is_better=False)
    limit = metric_limit(0.5, 0.0, lower_is_better=False)
    assert not metric_holds(0.4999, limit, lower_is_better=False)


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"reference_rel_l2": 1e-7}, "fidelity.batches", "pass"),
        ({"reference_rel_l2": 1e-5}, "fidelity.batches", "fail"),
        ({"reference_rel_l2": float("nan")}, "fidelity.batches", "fail"),
        ({"frozen_identical": False}, "frozen.identical", "fail"),
        ({"frozen_identical": None}, "frozen.identical", "unchecked"),
        ({"unvisited": (FIRST,)}, "nodes.finite", "unchecked"),
    ],
)
def test_what_was_run_is_what_was_judged(changes: dict[str, Any], name: str, status: str) -> None:
    found = verdict(divergence(**changes))
    assert check(name, found).status == status
    assert found.status == {"pass": "pass", "fail": "fail", "unchecked": "inconclusive"}[status]


@pytest.mark.parametrize(("behind", "required"), [((), True), ((FIRST,), False)])
def test_only_what_lies_behind_the_parting_is_left_to_the_outputs(
    behind: tuple[str, ...], required: bool
) -> None:
    """An expert that no batch chose is a gap, whether or not paths parted somewhere."""
    found = divergence(unvisited=(FIRST,), parted_paths=2, behind_parting=behind)
    nodes = check("nodes.finite", verdict(found))
    assert (nodes.status, nodes.required) == ("unchecked", required)
