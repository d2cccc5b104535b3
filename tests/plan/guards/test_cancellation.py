"""Differences of large, nearly equal values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN, Family
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.cancellation import Cancellation
from tests.plan.guards.helpers import (
    INF,
    NAN,
    above,
    activation,
    all_low,
    error,
    fires,
    guarded,
    reader,
    said,
    seen,
    site,
    spread,
    weight,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = Cancellation()


# --- by hand -------------------------------------------------------------------------------------

LIMIT, LIMIT_BF16 = 0.05 * 2.0**11, 0.05 * 2.0**8


@pytest.mark.parametrize(
    ("large", "small", "limit", "dtype", "expected"),
    [
        (LIMIT, 1.0, 0.05, F16, False),
        (above(LIMIT), 1.0, 0.05, F16, True),
        (-above(LIMIT), 1.0, 0.05, F16, True),
        (LIMIT_BF16, 1.0, 0.05, BF16, False),
        (above(LIMIT_BF16), 1.0, 0.05, BF16, True),
        (1024.0, 10.0, 0.05, F16, False),
        (1025.0, 10.0, 0.05, F16, True),
        (1024.0, 1.0, 0.5, F16, False),
        (1025.0, 1.0, 0.5, F16, True),
        (1e4, 0.0, 0.05, F16, False),  # equal values stay equal
        (NAN, 1.0, 0.05, F16, True),
        (INF, 1.0, 0.05, F16, True),
        (NAN, 1.0, 0.05, BF16, True),
        (INF, 1.0, 0.05, BF16, True),
        (1.0, INF, 0.05, F16, False),
        (NAN, 1.0, False, F16, False),
        (1e9, 1.0, False, BF16, False),
    ],
)
def test_a_difference_is_not_much_smaller_than_what_it_reads(
    large: float, small: float, limit: float, dtype: torch.dtype, expected: bool
) -> None:
    difference = site("sub", result=small, operands=(activation(small), activation(large, "other")))
    read = site("linear", result=large, feeds=(reader("tanh"), reader("sub", result=small)))
    for at in (difference, read):
        assert fires(GUARD, at, dtype, cancellation_error=limit) == expected


def test_the_finding_says_what_becomes_of_what() -> None:
    at = site("sub", result=0.25, operands=(activation(-1000.0),), batches=3)
    assert said(GUARD, at) == (
        "cancellation",
        "large values cancel, which leaves an error of 195%",
        "abs max 1000 becomes 0.25",
    )
    at = site("mul", result=1000.0, feeds=(reader("add", result=20.0),))
    assert said(GUARD, at, BF16) == (
        "cancellation",
        "large values cancel, which leaves an error of 20%",
        "abs max 1000 becomes 20",
    )


@pytest.mark.parametrize("op", [f.name for f in KNOWN if f.is_a(Family.SUM)])
def test_every_sum_of_two_counts(op: str) -> None:
    assert fires(GUARD, site(op[5:], result=1.0, operands=(weight(1e4),)))
    assert fires(GUARD, site("tanh", result=1e4, feeds=(reader(op[5:], result=1.0),)))


def test_integers_that_the_dtype_has_are_exact() -> None:
    """Positions relative to one another: 2000 - 1999 is 1 in FP16, and not in BF16."""
    for value, dtype, expected in ((2048.0, F16, False), (2049.0, F16, True), (257.0, BF16, True)):
        operands = (Operand("self", seen(value, integral=True)),)
        assert fires(GUARD, site("sub", result=1.0, operands=operands), dtype) == expected


def test_other_neighbours_do_not_fire() -> None:
    """Not another operator, not further on, not what was not measured."""
    assert not fires(GUARD, site("mul", result=1.0, operands=(activation(1e4),)))
    assert not fires(GUARD, site("tanh", result=1e4, feeds=(reader("mul", result=1.0),)))
    assert not fires(GUARD, site("tanh", result=1e4, reaches=(reader("sub", result=1.0),)))
    assert not fires(GUARD, site("tanh", result=1e4, feeds=(reader("sub"),)))
    assert not fires(GUARD, site("tanh", feeds=(reader("sub", result=1.0),)))
    assert not fires(GUARD, site("sub", operands=(activation(1e4),)))
    assert not fires(GUARD, site("sub", result=1.0, operands=(Operand("self", None),)))


# --- in a plan -----------------------------------------------------------------------------------


class Residue(nn.Module):
    """The difference of two layers around `level`, between two more."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.first, self.one, self.two, self.last = (nn.Linear(4, 4) for _ in range(4))
        for layer, factor in zip(self.children(), (1.0, 1.0, 0.5, 1.0), strict=True):
            nn.init.eye_(layer.weight).data.mul_(factor)
            nn.init.constant_(layer.bias, level if layer in (self.one, self.two) else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(self.one(h) - self.two(h).reshape(-1, 4))


@pytest.fixture(scope="module")
def large() -> Staged:
    return Staged.of(Residue(1000.0), spread(2, 4))


@pytest.mark.slow
def test_it_keeps_the_difference_and_what_makes_its_terms_in_fp32(large: Staged) -> None:
    assert table(large.plan()) == rows(
        """
        first/linear#0 | allow | op linear          | f16 | low | f16 f16 f16
        one/linear#0   | deny  | guard cancellation | f32 | -   | f32 . .
        two/linear#0   | deny  | guard cancellation | f32 | -   | f32 . .
        /reshape#0     | deny  | guard cancellation | f32 | -   | .
        /sub#0         | deny  | guard cancellation | f32 | -   | . .
        last/linear#0  | allow | op linear          | f16 | low | f16 f16 f16
        """
    )


@pytest.mark.slow
def test_tame_values_are_all_low() -> None:
    """In BF16 numbers of 6 leave an error of 4.7 % in one of 0.5."""
    assert all_low(Staged.of(Residue(5.0), spread(2, 4)).plan(rules_with(), BF16))
    middle = Staged.of(Residue(50.0), spread(2, 4))
    assert all_low(middle.plan(rules_with()))
    assert set(guarded(middle.plan(rules_with(), BF16)).values()) == {"cancellation"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 2e-3), (BF16, 2e-2)])
def test_without_it_the_digits_cancel(large: Staged, dtype: torch.dtype, tolerance: float) -> None:
    assert error(large, "default", dtype) < tolerance
    assert error(large, rules_with(cancellation_error=False), dtype) > 0.3
