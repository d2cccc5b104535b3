"""The plan as data: counts, shares, the table, and the rules file that gives it back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Decision
from tests.plan.plans_by_hand import decision, plan

FP32: dict[str, Any] = {"low": False, "dtype": "float32", "category": "deny"}


NONE: dict[str, Any] = {"low": False, "category": "none", "rule": "", "reason": "", "macs": 0}


# --- counts and shares ---------------------------------------------------------------------------


def test_shares_are_of_what_there_was_to_decide() -> None:
    found = plan(
        decision("a", macs=300),
        decision("b", macs=0),
        decision("c", **FP32),
        decision("d", **FP32),
        decision("e", **NONE),
    )
    assert (found.low_nodes(), found.decided_nodes()) == (2, 4)
    assert found.share_nodes_low() == 0.5
    assert found.share_macs_low() == 300 / 500


def test_shares_count_the_eval_graph() -> None:
    found = plan(decision("a"), train=(decision("a", **FP32), decision("b", **FP32)))
    assert (found.share_nodes_low(), found.share_macs_low()) == (1.0, 1.0)


def test_of_nothing_nothing_is_low() -> None:
    for empty in (plan(), plan(decision("a", **NONE))):
        assert (empty.share_nodes_low(), empty.share_macs_low()) == (0.0, 0.0)
        assert empty.unknown_ops() == {}


def test_unknown_ops_are_counted_and_sorted() -> None:
    unknown = {**FP32, "category": "unknown"}
    found = plan(
        decision("a", op="my.warp", **unknown),
        decision("b", op="aten.foo", **unknown),
        decision("c", op="my.warp", **unknown),
        decision("d", op="aten.bar", **FP32),
        train=(decision("e", op="my.other", **unknown),),
    )
    assert list(found.unknown_ops().items()) == [("aten.foo", 1), ("my.warp", 2)]


def test_casts_of_several_graphs_add_up() -> None:
    assert Casts(1, 2, 5) + Casts(10, 20, 50) == Casts(11, 22, 55)
    assert Casts() == Casts(0, 0, 0)


# --- the table -----------------------------------------------------------------------------------


def test_the_table_has_a_row_a_node_and_a_column_a_field() -> None:
    eval_only, train_only = decision("a", evidence="abs max 3"), decision("b", **FP32)
    found = plan(eval_only, decision("c"), train=(train_only,))
    frame = found.to_frame()
    derived = ["low", "input_dtypes", "rewrite"]
    assert list(frame.columns) == [*(field.name for field in fields(Decision)), *derived]
    assert list(frame["node"]) == ["a", "c"]
    row = frame.iloc[0]
    assert (row["evidence"], row["macs"], row["low"]) == ("abs max 3", 100, True)
    assert tuple(row["input_dtypes"]) == ("float16", None)
    assert list(found.to_frame("train")["node"]) == ["b"]
    assert list(plan().to_frame().columns) == list(frame.columns)
