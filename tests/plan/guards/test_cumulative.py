"""Running sums and products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN, Family
from amp_convert.plan.guards.cumulative import Cumulative
from tests.plan.guards.helpers import (
    INF,
    NAN,
    activation,
    all_low,
    error,
    fires,
    guarded,
    said,
    site,
)
from tests.staged import BF16, F16, Staged, rows, rule, rules_with, table

GUARD = Cumulative()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (64, 64.0, False),
        (65, 64.0, True),
        (9, 8.0, True),
        (65, 100.0, False),
        (10**6, False, False),
    ],
)
def test_it_runs_over_so_many_elements_at_most(
    length: int, limit: float, expected: bool, dtype: torch.dtype
) -> None:
    at = site("cumsum", shape=(2, length), axes=(1,))
    assert fires(GUARD, at, dtype, cumulative_length=limit) == expected


@pytest.mark.parametrize(
    ("axes", "length"), [((0,), 100), ((1,), 200), ((2,), 300), ((-3,), 100), ((), 300)]
)
def test_the_finding_counts_along_the_operators_axis(axes: tuple[int, ...], length: int) -> None:
    """Without an axis it is the last one."""
    assert said(GUARD, site("cumprod", shape=(100, 200, 300), axes=axes)) == (
        "cumulative",
        "it adds up one element after the other, and each keeps the errors before it",
        f"{length} elements",
    )


@pytest.mark.parametrize("op", [f.name for f in KNOWN if f.is_a(Family.CUMULATIVE)])
def test_every_cumulative_operator_counts(op: str) -> None:
    assert fires(GUARD, site(op[5:], shape=(65,), axes=(0,)))


@pytest.mark.parametrize("value", [NAN, INF])
def test_values_are_not_its_business(value: float) -> None:
    at = site("cumsum", shape=(64,), axes=(0,), result=value, operands=(activation(value),))
    assert not fires(GUARD, at)


def test_other_operators_and_single_numbers_do_not_fire() -> None:
    assert not fires(GUARD, site("sum", shape=(65,), axes=(0,)))
    assert not fires(GUARD, site("cummax", shape=(65,), axes=(0,)))
    assert not fires(GUARD, site("cumsum", axes=(0,)))
    assert not fires(GUARD, site("cumsum"), cumulative_length=0.5)


# --- in a plan -----------------------------------------------------------------------------------


class Decay(nn.Module):
    """A running product of factors near 1."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.last = nn.Linear(length, 2)
        nn.init.constant_(self.last.weight, 1 / length)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.cumprod(-1))


# The default rules deny it: here it is as low as it can be.
RULE = rule("allow", op="aten.cumprod")


def decay(length: int) -> Staged:
    return Staged.of(Decay(length), torch.full((2, length), 1.0004))


@pytest.fixture(scope="module")
def long() -> Staged:
    return decay(4000)


def test_it_keeps_the_running_product_in_fp32(long: Staged) -> None:
    assert table(long.plan(rules_with(RULE))) == rows(
        """
        /cumprod#0    | deny  | guard cumulative | f32 | -   | .
        last/linear#0 | allow | op linear        | f16 | low | f16 f16 f16
        """
    )
    assert guarded(long.plan(rules_with(RULE), BF16)) == {"/cumprod#0": "cumulative"}


@pytest.mark.slow
def test_a_short_one_is_low() -> None:
    assert all_low(decay(64).plan(rules_with(RULE)))
    assert all_low(decay(64).plan(rules_with(RULE), BF16))


def test_it_is_denied_anyway_by_default(long: Staged) -> None:
    assert [d.low for d in long.plan().eval] == [False, True]
    assert guarded(long.plan()) == {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 2e-3), (BF16, 2e-2)])
def test_without_it_every_factor_adds_its_rounding(
    long: Staged, dtype: torch.dtype, tolerance: float
) -> None:
    """Each factor is rounded to 1, and so is the product of 4000."""
    assert error(long, rules_with(RULE), dtype) < tolerance
    assert error(long, rules_with(RULE, cumulative_length=False), dtype) > 0.4
