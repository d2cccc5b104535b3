"""Measured values that keep a node in FP32, in whole plans."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from amp_convert.rules.load import load_rules
from tests.small_models import Faint
from tests.staged import BF16, Staged, decision, low, rows, rule, rules_with, table

# --- guards --------------------------------------------------------------------------------------


class Hot(nn.Module):
    """Between two products a value grows 30000-fold and is squashed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        for layer in (self.first, self.last):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(torch.relu(self.first(x)) * 30000.0))


COOL, WARM = torch.full((2, 4), 0.5), torch.full((2, 4), 1.25)


@pytest.mark.slow
def test_a_guard_pins_the_nodes_that_meet_the_value_and_no_other() -> None:
    plan = Staged.of(Hot(), COOL, calibration=[(COOL,), (WARM,)]).plan()
    assert table(plan) == rows(
        """
        first/linear#0 | allow | op linear              | f16 | low | f16 f16 f16
        /relu#0        | clear | op relu                | f16 | low | .
        /mul#0         | deny  | guard activation-range | f32 | -   | f32
        /tanh#0        | deny  | guard activation-range | f32 | -   | .
        last/linear#0  | allow | op linear              | f16 | low | f16 f16 f16
        """
    )
    result, reader = decision(plan, "/mul#0"), decision(plan, "/tanh#0")
    limit = "comes too near to the largest float16 number, 65504 (head room 2)"
    assert (result.reason, reader.reason) == (f"its result {limit}", f"an input {limit}")
    assert result.evidence == reader.evidence == "abs max 37500 in 2 batches"
    assert result.source == reader.source == "measured"
    assert decision(plan, "/relu#0").evidence == "abs max 1.25 in 2 batches"


def test_without_the_hot_batch_the_guard_is_silent() -> None:
    plan = Staged.of(Hot(), COOL).plan()
    assert plan.low_nodes() == 5
    assert decision(plan, "/mul#0").evidence == "abs max 15000 in 1 batch"


@pytest.fixture(scope="module")
def hot() -> Staged:
    return Staged.of(Hot(), COOL, calibration=[(WARM,)])


@pytest.mark.slow
def test_thresholds_come_from_the_rules_file(hot: Staged, tmp_path: Path) -> None:
    def guarded(line: str) -> list[str]:
        file = tmp_path / "mine.toml"
        file.write_text(f'extends = "default"\n[guards]\n{line}\n')
        plan = hot.plan(load_rules([str(file)]))
        return [d.node for d in plan.eval if d.rule.startswith("guard ")]

    assert guarded("activation_headroom = 2") == ["/aten.mul#0", "/aten.tanh#0"]
    assert guarded("activation_headroom = 1.7") == []
    assert guarded("activation_headroom = 70000") == [
        "first/aten.linear#0",
        "/aten.relu#0",
        "/aten.mul#0",
        "/aten.tanh#0",
        "last/aten.linear#0",
    ]
    assert guarded("activation_headroom = false") == []


def test_presets_that_convert_whatever_comes_have_no_guards(hot: Staged) -> None:
    for preset in ("half", "autocast"):
        assert [d.rule for d in hot.plan(preset).eval if "guard" in d.rule] == []


@pytest.mark.slow
def test_bf16_has_the_range_of_fp32(hot: Staged) -> None:
    assert hot.plan("default", BF16).low_nodes() == 5


def test_the_users_own_word_is_above_a_guards(hot: Staged) -> None:
    pinned = rules_with(rule("allow", node="/aten.mul#0"), rule("allow", op="aten.tanh"))
    plan = hot.plan(pinned)
    assert decision(plan, "/mul#0").low
    assert decision(plan, "/mul#0").rule == "node /aten.mul#0"
    assert decision(plan, "/tanh#0").rule == "guard activation-range"


@pytest.mark.parametrize(
    ("value", "node", "evidence", "still_low"),
    [
        (math.nan, "first/linear#0", "abs max nan in 3 batches", []),
        # 30000 times as much overflows even FP32; `tanh` makes 1 of it.
        (3e38, "/mul#0", "abs max inf in 3 batches", ["last/linear"]),
    ],
)
def test_nan_and_infinity_in_calibration_are_never_safe(
    value: float, node: str, evidence: str, still_low: list[str]
) -> None:
    bad = torch.full((2, 4), value)
    plan = Staged.of(Hot(), COOL, calibration=[(COOL,), (bad,), (COOL,)]).plan()
    assert low(plan) == still_low
    found = decision(plan, node)
    assert (found.rule, found.evidence) == ("guard activation-range", evidence)


@pytest.mark.slow
def test_an_input_that_the_cast_would_overflow_keeps_its_reader_in_fp32() -> None:
    """100000 is no FP16 number, small as the product is: the cast would make it infinite."""
    staged = Staged.of(Faint(1e-3), torch.full((2, 4), 1e5))
    found = decision(staged.plan(), "part.0/linear#0")
    assert (found.low, found.rule) == (False, "guard activation-range")
    assert found.evidence == "abs max 1e+05 in 1 batch"
    assert torch.isfinite(staged.convert().eval()(*staged.args)).all()


@pytest.mark.slow
def test_a_weight_out_of_range_keeps_its_reader_in_fp32() -> None:
    plan = Staged.of(Faint(1e5), torch.full((2, 4), 1e-3)).plan()
    found = decision(plan, "part.0/linear#0")
    assert (found.low, found.rule, found.source) == (False, "guard weight-range", "measured")
    assert "weight part.0.weight does not fit float16" in found.reason
    assert found.evidence == "abs max 1e+05"


def test_a_weight_that_would_lose_its_digits_keeps_its_reader_in_fp32() -> None:
    staged = Staged.of(Faint(1e-6), torch.full((2, 4), 1.0))
    found = decision(staged.plan(), "part.0/linear#0")
    assert (found.low, found.rule) == (False, "guard weight-tiny")
    assert found.evidence == "100.0% of its nonzero values"
    assert staged.plan(rules_with(), BF16).low_nodes() == 1
    assert staged.plan(rules_with(weight_tiny_share=False, activation_floor=False)).low_nodes() == 1


@pytest.mark.slow
def test_parameters_that_stay_fp32_are_not_guarded() -> None:
    """BatchNorm reads its running variance, here 10 million, in FP32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    torch.nn.init.constant_(model[1].running_var, 1e7)
    plan = Staged.of(model, COOL).plan()
    assert [d.low for d in plan.eval if d.decided] == [True, True, True]


@pytest.mark.slow
def test_without_values_there_is_no_evidence_and_no_guard() -> None:
    with torch.device("meta"):
        staged = Staged.of(Hot(), torch.empty(2, 4))
    plan = staged.plan()
    assert (plan.device, plan.calibration_batches) == ("meta", 0)
    assert {d.evidence for d in plan.eval if d.decided} == {"no evidence: nothing was measured"}
    assert plan.low_nodes() == 5
