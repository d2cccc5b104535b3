"""Nodes that neither a category nor a guard decides: casts, comparisons, kernels, parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.plan.costs import Casts
from amp_convert.rules.load import load_rules
from tests.small_models import Faint, example, ramp
from tests.staged import Staged, decision, low, rows, rule, rules_with, table

# --- what painting does not see ------------------------------------------------------------------


class Careful(nn.Module):
    """One summand is asked for in FP32."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.explicit = explicit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x), self.b(x)
        return self.last(torch.tanh((left.float() if self.explicit else left) + right))


@pytest.mark.slow
def test_what_follows_an_explicit_cast_to_fp32_stays_there() -> None:
    x = ramp(2, 8)
    plain, careful = (Staged.of(Careful(flag), x).plan() for flag in (False, True))
    assert low(plain) == ["a/linear", "b/linear", "/add", "/tanh", "last/linear"]
    assert low(careful) == ["a/linear", "b/linear", "last/linear"]
    cast = decision(careful, "/to#0")
    assert (cast.category, cast.rule, cast.source) == ("deny", "explicit cast", "model")
    assert cast.input_dtypes == (None,)
    assert decision(careful, "/add#0").input_dtypes == (None, "float32")
    assert decision(careful, "/tanh#0").reason.endswith("; follows aten.to, which stays in FP32")


@pytest.mark.slow
def test_no_rule_moves_an_explicit_cast() -> None:
    staged = Staged.of(Careful(True), ramp(2, 8))
    plan = staged.plan(rules_with(rule("allow", node="/aten.to#0"), preset="half"))
    found = decision(plan, "/to#0")
    assert (found.rule, found.dtype, found.low) == ("explicit cast", "float32", False)


class Compared(nn.Module):
    """Booleans and indices made from low values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        kept = torch.where(h > 0, h, torch.zeros_like(h))
        y = self.last(kept)
        return y, y.argmax(-1)


def test_a_comparison_of_low_values_is_low() -> None:
    """Its result has no precision, but it compares FP16 numbers."""
    plan = Staged.of(Compared(), ramp(2, 8)).plan()
    assert table(plan) == rows(
        """
        first/linear#0 | allow | op linear     | f16  | low | f16 f16 f16
        /gt#0          | clear | op gt         | bool | low | .
        /zeros_like#0  | clear | op zeros_like | f16  | low | .
        /where#0       | clear | op where      | f16  | low | . . .
        last/linear#0  | allow | op linear     | f16  | low | . f16 f16
        /argmax#0      | clear | op argmax     | i64  | low | .
        """
    )
    assert plan.share_nodes_low() == 1.0


class Written(nn.Module):
    def __init__(self, accumulate: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.accumulate = accumulate

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h.index_put((index,), h[:1], accumulate=self.accumulate))


@pytest.mark.slow
def test_a_write_that_adds_up_is_denied() -> None:
    inputs = (ramp(3, 8), torch.tensor([0, 0]))
    for accumulate in (False, True):
        staged = Staged.of(Written(accumulate), *inputs)
        found = decision(staged.plan(), "/index_put#0")
        assert found.low is not accumulate
        assert found.category == ("deny" if accumulate else "infer")
        assert decision(staged.plan("half"), "/index_put#0").low


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        return self.last(h.as_strided((2, 4), (8, 2))), self.last(x.as_strided((2, 4), (8, 1)))


@pytest.mark.slow
def test_raw_memory_is_read_as_it_lies() -> None:
    plan = Staged.of(Strided(), ramp(2, 8)).plan("half")
    found = [d for d in plan.eval if d.op == "aten.as_strided"]
    assert [(d.dtype, d.input_dtypes) for d in found] == [
        ("float16", (None,)),
        ("float32", (None,)),
    ]


# --- kernels -------------------------------------------------------------------------------------


def test_a_refused_kernel_stays_fp32_with_what_it_said() -> None:
    plan = example("block").plan(refused={"aten.gelu.default": '"gelu" not implemented for Half'})
    found = decision(plan, "/gelu#0")
    assert (found.category, found.rule, found.source) == ("deny", "no kernel", "measured")
    assert found.reason == "no float16 kernel for it on cpu"
    assert found.evidence == '"gelu" not implemented for Half'
    assert not found.low
    assert low(plan) == ["up/linear", "down/linear"]


def test_a_refusal_is_about_one_overload() -> None:
    plain = example("block").plan()
    assert example("block").plan(refused={"aten.gelu.other": "no"}) == plain
    # What is denied anyway keeps its reason.
    assert example("gated").plan(refused={"aten.exp.default": "no"}) == example("gated").plan()


def test_no_rule_makes_a_kernel() -> None:
    refused = {"aten.tanh.default": "no"}
    for rules in (rules_with(rule("allow", node="inner.act/aten.tanh#0")), load_rules(["half"])):
        found = decision(example("residual").plan(rules, refused=refused), "inner.act/tanh#0")
        assert (found.low, found.rule, found.evidence) == (False, "no kernel", "no")


def test_a_refused_op_behind_a_denied_one_still_passes_the_denial_on() -> None:
    """A kernel that is missing makes nothing behind it low."""
    plan = example("chained").plan(refused={"aten.sigmoid.default": "no"})
    assert low(plan) == ["first/linear", "last/linear"]


class Interpolated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.lerp(self.first(x), x, 0.5))


def test_an_op_that_refuses_while_planning_is_pinned() -> None:
    """Autocast leaves `lerp` one low and one FP32 input, which it does not take."""
    staged = Staged.of(Interpolated(), ramp(2, 8))
    plan = staged.plan("autocast")
    assert table(plan) == rows(
        """
        first/linear#0 | allow | op linear.default | f16 | low | f16 f16 f16
        /lerp#0        | deny  | no kernel         | f32 | -   | f32 .
        last/linear#0  | allow | op linear.default | f16 | low | f16 f16 f16
        """
    )
    assert decision(plan, "/lerp#0").reason == "it has no float16 kernel"
    assert low(staged.plan()) == ["first/linear", "/lerp", "last/linear"]


# --- several graphs ------------------------------------------------------------------------------


class Forked(nn.Module):
    """What cannot be exported, between two parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Faint(1e5), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.left(x)
        return self.right(h) if float(h.sum()) > 0 else h


@pytest.mark.slow
def test_parts_are_planned_under_their_own_names() -> None:
    plan = Staged.of(Forked(), torch.full((2, 4), 1e-3)).plan()
    assert [d.node for d in plan.eval] == ["left.part.0/aten.linear#0", "right/aten.linear#0"]
    assert "weight left.part.0.weight" in plan.eval[0].reason
    assert [d.low for d in plan.eval] == [False, True]
    assert [u.layer for u in plan.uncaptured] == [""]
    assert plan.eval_casts == Casts(2, 2, 4)
