"""What a user's own rules do to a plan, and what an op without a rule does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Painting, Rules
from tests.graph_operations import damped
from tests.small_models import example, ramp
from tests.staged import BF16, Staged, decision, low, rows, rule, rules_with, table

# --- overrides -----------------------------------------------------------------------------------


TANH = "inner.act/aten.tanh#0"


@pytest.mark.parametrize(
    "target",
    [
        {"node": TANH},
        {"layer": "inner.act"},
        {"layer": "inner"},
        {"layer": "in*"},
        {"layer": "*.act"},
        {"module": "torch.nn.Tanh"},
        {"module": "torch.nn.modules.activation.Tanh"},
        {"module": "Tanh"},
    ],
)
def test_a_denied_node_stays_fp32_and_does_not_flood(target: dict[str, str]) -> None:
    plan = example("residual").plan(rules_with(rule("deny", name="mine.toml:7", **target)))
    ((kind, pattern),) = target.items()
    found = decision(plan, "inner.act/tanh#0")
    assert (found.category, found.low, found.dtype) == ("deny", False, "float32")
    assert (found.rule, found.source) == (f"{kind} {pattern}", "mine.toml:7")
    assert found.reason == "the test says so"
    assert found.input_dtypes == ("float32",)
    assert low(plan) == ["first/linear", "/add", "last/linear"]
    assert decision(plan, "/add#0").input_dtypes == ("float16", None)


def test_a_denied_op_floods() -> None:
    plan = example("residual").plan(rules_with(rule("deny", op="aten.tanh")))
    assert low(plan) == ["first/linear", "last/linear"]
    assert decision(plan, "/add#0").reason.endswith(
        "; follows aten.tanh in inner.act, which stays in FP32"
    )


def test_a_node_rule_is_no_glob() -> None:
    plan = example("residual").plan(
        rules_with(rule("deny", node="inner.act/*"), rule("deny", node="*"))
    )
    assert plan.unmatched_rules == (
        "node inner.act/* (test.toml:1; the nearest is inner.act/aten.tanh#0)",
        "node * (test.toml:1)",
    )
    assert replace(plan, unmatched_rules=()) == replace(
        example("residual").plan(), rules=plan.rules
    )


def test_the_last_override_wins_and_none_loses_to_an_op_rule() -> None:
    deny_then_allow = [rule("deny", layer="inner"), rule("allow", node=TANH)]
    assert "inner.act/tanh" in low(example("residual").plan(rules_with(*deny_then_allow)))
    assert "inner.act/tanh" not in low(example("residual").plan(rules_with(*deny_then_allow[::-1])))
    override_then_op = [rule("deny", layer="inner"), rule("allow", op="aten.tanh")]
    assert "inner.act/tanh" not in low(example("residual").plan(rules_with(*override_then_op)))


def test_allowing_a_denied_op_seeds_low_precision() -> None:
    """With exp low, what follows is still denied by the sum."""
    plan = example("gated").plan(rules_with(rule("allow", node="/aten.exp#0")))
    assert low(plan)[:3] == ["a/linear", "/split", "/exp"]
    assert decision(plan, "/exp#0").rule == "node /aten.exp#0"
    assert decision(plan, "/add#0").reason.endswith("; follows aten.sum, which stays in FP32")


def test_an_override_to_infer_or_clear_takes_part_in_painting() -> None:
    for category in ("infer", "clear"):
        plan = example("residual").plan(rules_with(rule(category, layer="inner")))
        found = decision(plan, "inner.act/tanh#0")
        assert (found.category, found.low) == (category, True)
        assert found.reason == "the test says so; joins the low-precision ops around it"
    unset = [rule("clear", op="aten.linear"), rule("infer", layer="inner")]
    assert low(example("residual").plan(rules_with(*unset))) == []


def test_a_rule_for_another_dtype_or_device_does_not_count() -> None:
    brain = replace(rule("deny", layer="inner"), dtype="bfloat16")
    assert "inner.act/tanh" in low(example("residual").plan(rules_with(brain)))
    assert "inner.act/tanh" not in low(example("residual").plan(rules_with(brain), BF16))
    elsewhere = replace(rule("deny", layer="inner"), device="cuda")
    assert "inner.act/tanh" in low(example("residual").plan(rules_with(elsewhere)))


class Branching(nn.Module):
    """After exp, a clear op that feeds a normalisation and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        kept = torch.relu(torch.exp(x))
        return self.norm(kept), self.out(kept)


@pytest.mark.slow
def test_denying_a_layer_lowers_none_of_its_inputs() -> None:
    """`relu` is denied, since it leads from exp to an infer op; pinning that op to FP32 is no
    ground to round its input."""
    staged = Staged.of(Branching(), ramp(2, 8))
    assert low(staged.plan()) == ["out/linear"]
    assert low(staged.plan(rules_with(rule("deny", layer="norm")))) == ["out/linear"]


@pytest.mark.parametrize("node", ["/aten.exp#0", "/aten.sigmoid#0", "/aten.mul#0"])
def test_denying_a_node_that_was_fp32_lowers_nothing_behind_it(node: str) -> None:
    assert low(example("chained").plan()) == ["first/linear", "last/linear"]
    pinned = rules_with(rule("deny", node=node))
    assert low(example("chained").plan(pinned)) == ["first/linear", "last/linear"]


# --- unknown ops ---------------------------------------------------------------------------------


class WithUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(damped(torch.relu(damped(self.first(x))))))


@pytest.mark.slow
def test_an_unknown_op_stays_fp32_stops_painting_and_is_counted() -> None:
    staged = Staged.of(WithUnknown(), ramp(2, 8))
    plan = staged.plan()
    assert table(plan) == rows(
        """
        first/linear#0              | allow   | op linear  | f16 | low | f16 f16 f16
        /amp_convert_tests.damped#0 | unknown | unknown op | f32 | -   | f32
        /relu#0                     | clear   | op relu    | f32 | -   | .
        /amp_convert_tests.damped#1 | unknown | unknown op | f32 | -   | .
        /relu#1                     | clear   | op relu    | f16 | low | f16
        last/linear#0               | allow   | op linear  | f16 | low | . f16 f16
        """
    )
    assert plan.unknown_ops() == {"amp_convert_tests.damped": 2}
    found = decision(plan, "/amp_convert_tests.damped#0")
    assert found.reason == "no rule names this op, so it stays in FP32"
    assert found.source == ""
    # Autocast's painting keeps what it has no word for in FP32 too.
    known = [r for r in load_rules(["autocast"]).rules if r.pattern != "*"]
    alone = replace(load_rules(["autocast"]), rules=(*known, rule("clear", op="aten.relu")))
    judged = staged.plan(alone)
    assert decision(judged, "/amp_convert_tests.damped#0").input_dtypes == ("float32",)
    assert judged.unknown_ops() == {"amp_convert_tests.damped": 2}
    # A rule makes it known.
    named = staged.plan(rules_with(rule("infer", op="amp_convert_tests.damped")))
    assert named.unknown_ops() == {}
    assert named.low_nodes() == named.decided_nodes() == 6


def test_painting_is_the_rules_own() -> None:
    """Each word alone under autocast's painting: deny takes FP32, infer the widest."""
    words = [rule("allow", op="aten.linear"), rule("deny", op="aten.tanh"), rule("infer", op="*")]
    rules = Rules("", Painting.AUTOCAST, (words[2], *words[:2]), rules_with().guards, ())
    assert table(example("residual").plan(rules)) == rows(
        """
        first/linear#0   | allow | op linear | f16 | low | f16 f16 f16
        inner.act/tanh#0 | deny  | op tanh   | f32 | -   | f32
        /add#0           | infer | op *      | f32 | -   | . f32
        last/linear#0    | allow | op linear | f16 | low | f16 f16 f16
        """
    )
