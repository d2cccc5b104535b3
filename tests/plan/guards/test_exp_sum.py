"""Exponentials that feed a sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN, Family
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.exp_sum import ExpSum
from tests.plan.guards.helpers import (
    INF,
    NAN,
    above,
    activation,
    all_low,
    b16_table,
    diagonal,
    error,
    fires,
    guarded,
    reader,
    said,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rule, rules_with

GUARD = ExpSum()


# --- by hand -------------------------------------------------------------------------------------

LIMIT = 16.0


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (LIMIT, LIMIT, False),
        (above(LIMIT), LIMIT, True),
        (20.0, 20.0, False),
        (above(20.0), 20.0, True),
        (NAN, LIMIT, True),
        (INF, LIMIT, True),
        (INF, False, False),
        (NAN, False, False),
    ],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_terms_of_the_sum_are_nearly_exact(
    value: float, limit: float, expected: bool, dtype: torch.dtype
) -> None:
    at = site("exp", operands=(activation(value),), feeds=(reader("div"), reader("sum")))
    assert fires(GUARD, at, dtype, exp_growth=limit) == expected


def test_the_finding_says_how_far_the_terms_would_be_off() -> None:
    at = site("exp", operands=(activation(40.0),), feeds=(reader("sum"),), batches=2)
    assert said(GUARD, at) == (
        "exp-sum",
        "an exponential feeds a sum, whose largest term would be off by 2.0%",
        "max 40",
    )
    assert said(GUARD, at, BF16) == (
        "exp-sum",
        "an exponential feeds a sum, whose largest term would be off by 15.6%",
        "max 40",
    )


@pytest.mark.parametrize("op", [f.name for f in KNOWN if f.is_a(Family.EXPONENTIAL)])
@pytest.mark.parametrize("consumer", [f.name for f in KNOWN if f.sums])
def test_every_exponential_before_every_sum_counts(op: str, consumer: str) -> None:
    at = site(op[5:], operands=(activation(40.0),), feeds=(reader(consumer[5:]),))
    assert fires(GUARD, at)


def test_other_neighbours_do_not_fire() -> None:
    """Not before a product, not further on, not another function, not unmeasured."""
    hot, sums = (activation(40.0),), (reader("sum"),)
    assert not fires(GUARD, site("exp", operands=hot, feeds=(reader("mul"),)))
    assert not fires(GUARD, site("exp", operands=hot, reaches=sums))
    assert not fires(GUARD, site("exp", operands=hot))
    assert not fires(GUARD, site("tanh", operands=hot, feeds=sums))
    assert not fires(GUARD, site("exp", operands=(Operand("self", None),), feeds=sums))


# --- in a plan -----------------------------------------------------------------------------------


class Weighted(nn.Module):
    """A softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.last = diagonal(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = torch.exp(x)
        return self.last(terms / terms.sum(-1, keepdim=True))


# The default rules deny both: here they are as low as they can be.
RULES = (rule("allow", op="aten.exp"), rule("infer", op="aten.sum"))


@pytest.fixture(scope="module")
def large() -> Staged:
    """Exponents between two of BF16's numbers, 19 and 18.875. FP16 has no exponential of them."""
    return Staged.of(
        Weighted(), torch.tensor([[19.03, 19.06, 18.97, 18.91], [18.97] * 2 + [19.06] * 2])
    )


def test_it_keeps_the_exponential_in_fp32_and_that_floods_the_sum(large: Staged) -> None:
    """The sum and the quotient could be low only between two low nodes."""
    assert b16_table(large.plan(rules_with(*RULES), BF16)) == rows(
        """
        /exp#0        | deny  | guard exp-sum | f32 | -   | .
        /sum#0        | infer | op sum        | f32 | -   | .
        /div#0        | infer | op div        | f32 | -   | . .
        last/linear#0 | allow | op linear     | b16 | low | b16 b16
        """
    )


@pytest.mark.slow
def test_tame_exponents_are_all_low() -> None:
    staged = Staged.of(Weighted(), spread(2, 4, low=-2.0, high=2.0))
    for dtype in (F16, BF16):
        assert all_low(staged.plan(rules_with(*RULES), dtype))


def test_an_exponential_is_denied_anyway_by_default(large: Staged) -> None:
    assert guarded(large.plan(rules_with(), BF16)) == {}
    assert [d.low for d in large.plan(rules_with(), BF16).eval] == [False, False, False, True]


@pytest.mark.slow
def test_without_it_the_shares_are_others(large: Staged) -> None:
    assert error(large, rules_with(*RULES), BF16) < 5e-3
    assert error(large, rules_with(*RULES, exp_growth=False), BF16) > 2e-2


@pytest.mark.slow
def test_a_term_that_vanishes_is_no_reason() -> None:
    """In FP16 nothing else makes it fire: an exponent of 11 already overflows."""
    staged = Staged.of(Weighted(), torch.tensor([[-25.0, 0.0, 1.0, 0.5]]))
    assert error(staged, rules_with(*RULES, exp_growth=False)) < 2e-3
    assert guarded(staged.plan(rules_with(*RULES))) == {}


class Computed(nn.Module):
    """The exponents are what a low layer made of small numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weighted = diagonal(19.0), Weighted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weighted(self.first(x))


@pytest.mark.slow
def test_what_makes_the_exponent_is_kept_as_well() -> None:
    x = torch.tensor([[1.0, 255 / 256, 254 / 256, 253 / 256], [253 / 256, 1.0, 255 / 256, 1.0]])
    staged = Staged.of(Computed(), x)
    assert set(guarded(staged.plan(rules_with(*RULES), BF16))) >= {"first/linear#0"}
    assert error(staged, rules_with(*RULES), BF16) < 5e-3
