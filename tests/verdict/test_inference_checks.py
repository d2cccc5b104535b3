"""Each check other than those on the outputs, from both sides of its limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.capture.captured import Uncaptured
from tests.evidence import (
    FIRST,
    LAST,
    NODES,
    check,
    divergence,
    fidelity,
    in_fp32,
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
