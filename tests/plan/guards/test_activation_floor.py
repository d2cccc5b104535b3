"""Activations so small that FP16 loses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards.activation_range import ActivationFloor
from tests.plan.guards.helpers import (
    INF,
    NAN,
    SMALLEST,
    activation,
    all_low,
    below,
    chain,
    diagonal,
    error,
    fires,
    said,
    site,
    spread,
    weight,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = ActivationFloor()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "floor", "dtype", "expected"),
    [
        (SMALLEST, SMALLEST, F16, False),  # the smallest normal number has all its digits
        (below(SMALLEST), SMALLEST, F16, True),
        (-below(SMALLEST), SMALLEST, F16, True),
        (1e-30, SMALLEST, F16, True),
        (0.0, SMALLEST, F16, False),  # zero is zero in every dtype
        (0.5, 1.0, F16, True),
        (1e-30, SMALLEST, BF16, False),  # BF16 has FP32's exponents
        (NAN, SMALLEST, F16, False),  # the range guard's business
        (INF, SMALLEST, F16, False),
        (1e-30, False, F16, False),
    ],
)
def test_results_and_inputs_are_somewhere_as_large_as_the_floor(
    value: float, floor: float, dtype: torch.dtype, expected: bool
) -> None:
    result = site("tanh", result=value, operands=(activation(1.0),))
    operand = site("tanh", result=1.0, operands=(activation(1.0), activation(value, "other")))
    for at in (result, operand):
        assert fires(GUARD, at, dtype, activation_floor=floor) == expected


def test_the_finding_names_the_value_the_limit_and_the_evidence() -> None:
    at = site("tanh", result=1e-5, operands=(activation(1e-6),), batches=3)
    assert said(GUARD, at) == (
        "activation-floor",
        "its result is nowhere above 6.1e-05: float16 loses it",
        "abs max 1e-05 in 3 batches",
    )
    at = site("tanh", result=1.0, operands=(activation(1e-6),))
    assert said(GUARD, at, activation_floor=1e-3) == (
        "activation-floor",
        "an input is nowhere above 0.001: float16 loses it",
        "abs max 1e-06 in 1 batch",
    )


def test_weights_and_what_was_not_measured_are_not_its_business() -> None:
    assert not fires(GUARD, site("linear", operands=(weight(1e-6),)))


# --- in a plan -----------------------------------------------------------------------------------


def faint(factor: float) -> nn.Sequential:
    """Between two layers the values shrink `factor`-fold, and grow again."""
    return chain(
        first=diagonal(1.0), shrink=diagonal(1 / factor), grow=diagonal(factor), last=diagonal(1.0)
    )


@pytest.fixture(scope="module")
def small() -> Staged:
    """1e-7 is two steps of the smallest that FP16 has."""
    return Staged.of(faint(1e4), spread(2, 4) * 1e-3)


def test_it_keeps_what_makes_and_what_reads_the_small_value_in_fp32(small: Staged) -> None:
    assert table(small.plan()) == rows(
        """
        first/linear#0  | allow | op linear              | f16 | low | f16 f16
        shrink/linear#0 | deny  | guard activation-floor | f32 | -   | f32 .
        grow/linear#0   | deny  | guard activation-floor | f32 | -   | . .
        last/linear#0   | allow | op linear              | f16 | low | f16 f16
        """
    )


@pytest.mark.slow
def test_bf16_and_tame_values_are_all_low(small: Staged) -> None:
    assert all_low(small.plan("default", BF16))
    assert all_low(Staged.of(faint(10.0), spread(2, 4) * 1e-3).plan())


def test_without_it_the_digits_are_lost(small: Staged) -> None:
    assert error(small) < 2e-3
    assert error(small, rules_with(activation_floor=False)) > 0.1
    assert error(small, rules_with(activation_floor=False), BF16) < 1e-2
