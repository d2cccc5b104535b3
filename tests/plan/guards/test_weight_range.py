"""Weights too large for the low dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.weight_range import WeightRange
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
    fires,
    guarded,
    said,
    site,
    spread,
    weight,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = WeightRange()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "headroom", "dtype", "expected"),
    [
        (LARGEST, 1.0, F16, False),
        (above(LARGEST), 1.0, F16, True),
        (-above(LARGEST), 1.0, F16, True),
        (LARGEST, 2.0, F16, True),
        (1e9, 1.0, BF16, False),
        (LARGEST_BF16, 1.0, BF16, False),
        (above(LARGEST_BF16), 1.0, BF16, True),
        (NAN, 1.0, F16, True),
        (NAN, 1.0, BF16, True),
        (INF, 1.0, F16, True),
        (INF, 1.0, BF16, True),
        (INF, False, F16, False),
        (NAN, False, BF16, False),
    ],
)
def test_weights_fit_their_dtype(
    value: float, headroom: float, dtype: torch.dtype, expected: bool
) -> None:
    at = site("linear", operands=(activation(1.0), weight(1.0), weight(value)))
    assert fires(GUARD, at, dtype, weight_headroom=headroom) == expected


def test_the_finding_names_the_weight() -> None:
    at = site("linear", operands=(weight(1.0), weight(-1e6, name="decoder.bias")), batches=3)
    assert said(GUARD, at) == (
        "weight-range",
        "weight decoder.bias does not fit float16, whose largest number is 65504",
        "abs max 1e+06",
    )


def test_activations_and_what_was_not_measured_are_not_its_business() -> None:
    unmeasured = Operand("weight", None, weight="encoder.weight")
    assert not fires(GUARD, site("linear", result=NAN, operands=(activation(INF), unmeasured)))


# --- in a plan -----------------------------------------------------------------------------------


def loud(factor: float) -> nn.Sequential:
    """The weights of one layer, and nothing else, are large."""
    return chain(first=diagonal(1.0), big=diagonal(factor), last=diagonal(0.1))


@pytest.fixture(scope="module")
def big() -> Staged:
    return Staged.of(loud(1e5), spread(2, 4) * 1e-2)


def test_it_keeps_the_layer_of_the_weight_in_fp32(big: Staged) -> None:
    assert table(big.plan()) == rows(
        """
        first/linear#0 | allow | op linear          | f16 | low | f16 f16
        big/linear#0   | deny  | guard weight-range | f32 | -   | f32 .
        last/linear#0  | allow | op linear          | f16 | low | f16 f16
        """
    )


def test_bf16_and_tame_weights_are_all_low(big: Staged) -> None:
    assert all_low(big.plan("default", BF16))
    assert all_low(Staged.of(loud(6e4), spread(2, 4) * 1e-2).plan())


def test_a_buffer_is_a_weight() -> None:
    class Shifted(nn.Module):
        shift: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = diagonal(1.0), diagonal(1.0)
            self.register_buffer("shift", torch.tensor([-1e9, 0.5, 0.5, 0.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last((self.first(x) + self.shift).clamp(-1, 1))

    off = rules_with(activation_headroom=False)
    assert guarded(Staged.of(Shifted(), spread(2, 4)).plan(off)) == {"/add#0": "weight-range"}


def test_without_it_the_weights_are_infinite(big: Staged) -> None:
    assert error(big) < 2e-3
    assert error(big, rules_with(weight_headroom=False)) == INF
    assert error(big, rules_with(weight_headroom=False), BF16) < 1e-2
