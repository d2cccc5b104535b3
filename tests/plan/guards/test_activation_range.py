"""Activations too large for the low dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.activation_range import ActivationRange
from amp_convert.profile.calibrate import Range
from tests.plan.guards.helpers import (
    INF,
    LARGEST,
    LARGEST_BF16,
    NAN,
    above,
    activation,
    all_low,
    chain,
    diagonal,
    error,
    finding,
    fires,
    guarded,
    said,
    seen,
    site,
    spread,
    weight,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = ActivationRange()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "headroom", "dtype", "expected"),
    [
        (LARGEST / 2, 2.0, F16, False),  # the limit itself still fits
        (above(LARGEST / 2), 2.0, F16, True),
        (LARGEST, 1.0, F16, False),
        (LARGEST, 1.001, F16, True),
        (100.0, 1000.0, F16, True),
        (70000.0, 0.5, F16, False),
        (LARGEST_BF16 / 2, 2.0, BF16, False),
        (above(LARGEST_BF16 / 2), 2.0, BF16, True),
        (0.0, 2.0, F16, False),
        (NAN, 2.0, F16, True),
        (NAN, 2.0, BF16, True),
        (INF, 2.0, F16, True),
        (INF, 2.0, BF16, True),
        (INF, False, F16, False),
        (NAN, False, BF16, False),
    ],
)
def test_results_and_inputs_keep_their_head_room(
    value: float, headroom: float, dtype: torch.dtype, expected: bool
) -> None:
    result = site("tanh", result=value, operands=(activation(1.0),))
    operand = site("tanh", result=1.0, operands=(activation(1.0), activation(value, "other")))
    for at in (result, operand):
        assert fires(GUARD, at, dtype, activation_headroom=headroom) == expected


def test_the_finding_names_the_value_the_limit_and_the_evidence() -> None:
    at = site("tanh", result=1.0, operands=(activation(2.0), activation(-60000.0)), batches=4)
    assert said(GUARD, at) == (
        "activation-range",
        "an input comes too near to the largest float16 number, 65504 (head room 2)",
        "abs max 60000 in 4 batches",
    )


def test_the_result_comes_first() -> None:
    at = site("tanh", result=71234.0, operands=(activation(99999.0),))
    assert said(GUARD, at, activation_headroom=1.5) == (
        "activation-range",
        "its result comes too near to the largest float16 number, 65504 (head room 1.5)",
        "abs max 71234 in 1 batch",
    )


@pytest.mark.parametrize(("value", "text"), [(NAN, "nan"), (INF, "inf")])
def test_the_evidence_says_what_was_seen_of_a_value_that_is_no_number(
    value: float, text: str
) -> None:
    assert said(GUARD, site("tanh", result=value, batches=2), BF16) == (
        "activation-range",
        "its result comes too near to the largest bfloat16 number, 3.3895e+38 (head room 2)",
        f"abs max {text} in 2 batches",
    )


def test_weights_and_what_was_not_measured_are_not_its_business() -> None:
    assert not fires(GUARD, site("linear", operands=(weight(NAN), Operand("self", None))))
    assert not fires(GUARD, site("linear"))


@pytest.mark.parametrize(
    ("op", "exponent", "headroom"),
    [
        ("pow", 2.0, 4.0),
        ("pow", 3.0, 8.0),
        ("pow", -2.0, 4.0),
        ("pow", 0.5, 2.0),  # a root's head room is not less than that of other operators
        ("mul", 2.0, 2.0),  # no power
    ],
)
def test_a_powers_head_room_is_that_of_its_input(op: str, exponent: float, headroom: float) -> None:
    fitting, beyond = (
        site(op, result=value, scalars={"exponent": exponent})
        for value in (LARGEST / headroom, above(LARGEST / headroom))
    )
    assert not fires(GUARD, fitting)
    found = finding(GUARD, beyond)
    assert found is not None
    assert found.reason.endswith(f"(head room {headroom:g})")


def test_the_input_of_a_power_has_the_plain_head_room() -> None:
    at = site("pow", result=1.0, scalars={"exponent": 3.0}, operands=(activation(LARGEST / 2),))
    assert not fires(GUARD, at)


def test_of_a_mask_only_the_largest_value_counts() -> None:
    """The others are clamped."""
    for range_, expected in ((Range(1e9, 4.0), False), (Range(1e9, 1e9), True)):
        operand = Operand("self", range_, mask=True)
        assert fires(GUARD, site("add", result=range_, masked=True)) == expected
        assert fires(GUARD, site("add", operands=(operand,), masked=True)) == expected
    for range_ in (Range(NAN, NAN), Range(INF, INF)):
        assert fires(GUARD, site("add", result=range_, masked=True))
    assert fires(GUARD, site("add", result=Range(1e9, 4.0)))


def test_a_power_of_any_height_has_head_room() -> None:
    assert fires(GUARD, site("pow", result=1.0, scalars={"exponent": 2000.0}))


# --- in a plan -----------------------------------------------------------------------------------


def bulge(factor: float) -> nn.Sequential:
    """Between two layers the values grow `factor`-fold, twice, and shrink again."""
    return chain(
        first=diagonal(1.0),
        up=diagonal(factor),
        grow=diagonal(factor),
        shrink=diagonal(1e-3),
        last=diagonal(1.0),
    )


@pytest.fixture(scope="module")
def hot() -> Staged:
    return Staged.of(bulge(300.0), spread(2, 4))


@pytest.mark.slow
def test_it_keeps_what_makes_and_what_reads_the_large_value_in_fp32(hot: Staged) -> None:
    assert table(hot.plan(rules_with())) == rows(
        """
        first/linear#0  | allow | op linear              | f16 | low | f16 f16
        up/linear#0     | allow | op linear              | f16 | low | . f16
        grow/linear#0   | deny  | guard activation-range | f32 | -   | f32 .
        shrink/linear#0 | deny  | guard activation-range | f32 | -   | . .
        last/linear#0   | allow | op linear              | f16 | low | f16 f16
        """
    )


@pytest.mark.slow
def test_bf16_and_tame_values_are_all_low(hot: Staged) -> None:
    assert all_low(hot.plan("default", BF16))
    assert all_low(Staged.of(bulge(100.0), spread(2, 4)).plan())


@pytest.mark.slow
def test_bf16_has_a_limit_too() -> None:
    staged = Staged.of(bulge(1.5e19), spread(2, 4))
    expected = dict.fromkeys(("grow/linear#0", "shrink/linear#0"), "activation-range")
    assert guarded(staged.plan(rules_with(), BF16)) == expected


def test_without_it_the_output_overflows(hot: Staged) -> None:
    assert error(hot) < 2e-3
    assert error(hot, rules_with(activation_headroom=False)) == INF


@pytest.mark.slow
def test_the_ranges_that_count_are_those_of_all_batches() -> None:
    staged = Staged.of(
        bulge(100.0), spread(2, 4), calibration=[(spread(2, 4),), (torch.ones(1, 4) * 4,)]
    )
    assert set(guarded(staged.plan(rules_with())).values()) == {"activation-range"}
    assert seen(4e4) == staged.stats.ranges["grow/aten.linear#0"]


class Scores(nn.Module):
    """Scores of `x`, hidden where what a layer makes of `y` is under a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.other, self.last = diagonal(1e-4), diagonal(1.0), diagonal(1.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = self.scores(x).masked_fill(self.other(y) < -1.02e5, -1e9)
        return self.last(scores.softmax(-1))


FAR = torch.tensor([[-1e5, -0.95e5, -1.05e5, 1.0]])


@pytest.mark.slow
def test_what_scores_are_computed_from_is_no_mask() -> None:
    staged = Staged.of(Scores(), FAR, torch.ones(1, 4))
    assert guarded(staged.plan())["scores/linear#0"] == "activation-range"
    assert error(staged) < 2e-3


@pytest.mark.slow
def test_what_a_condition_compares_is_no_mask() -> None:
    staged = Staged.of(Scores(), torch.ones(1, 4), FAR)
    assert guarded(staged.plan())["other/linear#0"] == "activation-range"
    assert error(staged) < 2e-3
