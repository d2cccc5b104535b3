"""An eps that keeps a denominator, a root or a logarithm away from zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.epsilon import Epsilon, eps_of
from tests.plan.guards.helpers import (
    INF,
    NAN,
    SMALLEST,
    all_low,
    below,
    diagonal,
    error,
    fires,
    guarded,
    reader,
    said,
    site,
)
from tests.staged import BF16, F16, Staged, rows, rule, rules_with, table

GUARD = Epsilon()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "smallest", "dtype", "expected"),
    [
        (SMALLEST, SMALLEST, F16, False),
        (below(SMALLEST), SMALLEST, F16, True),
        (1e-12, SMALLEST, F16, True),
        (0.5, 1.0, F16, True),
        (0.0, SMALLEST, F16, False),  # a clamp at zero keeps nothing from zero
        (-1e-8, SMALLEST, F16, False),
        (NAN, SMALLEST, F16, False),
        (INF, SMALLEST, F16, False),
        (1e-12, SMALLEST, BF16, False),  # BF16 has FP32's exponents
        (1e-12, False, F16, False),
    ],
)
def test_an_eps_is_a_normal_number(
    eps: float, smallest: float, dtype: torch.dtype, expected: bool
) -> None:
    divides = site("div", operands=(Operand("self", None), Operand("other", None, eps=eps)))
    adds = site("add", scalars={"other": eps}, feeds=(reader("div", "other"),))
    for at in (divides, adds):
        assert fires(GUARD, at, dtype, smallest_eps=smallest) == expected


def test_the_finding_names_the_eps() -> None:
    reason = "an eps under 6.1e-05 becomes zero or loses digits in float16"
    assert said(GUARD, site("div", operands=(Operand("other", None, eps=1e-6),), batches=2)) == (
        "epsilon",
        reason,
        "eps = 1e-06",
    )
    assert said(GUARD, site("clamp_min", scalars={"min": 1e-12}, feeds=(reader("rsqrt"),))) == (
        "epsilon",
        reason,
        "eps = 1e-12",
    )


@pytest.mark.parametrize(("op", "argument"), [(f.name, f.singular) for f in KNOWN if f.singular])
def test_every_singular_operator_has_its_argument(op: str, argument: str) -> None:
    assert fires(GUARD, site(op[5:], operands=(Operand(argument, None, eps=1e-8),)))
    assert not fires(GUARD, site(op[5:], operands=(Operand("nominator", None, eps=1e-8),)))
    assert fires(GUARD, site("add", scalars={"other": 1e-8}, feeds=(reader(op[5:], argument),)))


def test_other_neighbours_do_not_fire() -> None:
    """Nobody divides by it: a nominator, a product; or nobody reads it at all."""
    for feeds in ((), (reader("div", "self"),), (reader("mul", "other"),)):
        assert not fires(GUARD, site("add", scalars={"other": 1e-8}, feeds=feeds))
    assert not fires(GUARD, site("mul", operands=(Operand("other", None, eps=1e-8),)))
    assert not fires(GUARD, site("mul", scalars={"other": 1e-8}, feeds=(reader("sqrt"),)))


@pytest.mark.parametrize(
    ("op", "scalars", "eps"),
    [
        ("aten.add", {"other": 1e-8, "alpha": 1.0}, 1e-8),
        ("aten.maximum", {"other": 1e-8}, 1e-8),
        ("aten.clamp", {"min": 1e-8, "max": 1.0}, 1e-8),
        ("aten.clamp", {"max": 1e-8}, None),
        ("aten.clamp_min", {"min": 1e-8}, 1e-8),
        ("aten.mul", {"other": 1e-8}, None),
        ("aten.add", {}, None),
    ],
)
def test_where_an_eps_stands(op: str, scalars: dict[str, float], eps: float | None) -> None:
    assert eps_of(op, scalars) == eps


# --- in a plan -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A value divided by its own size, which is zero at one place, between two layers."""

    def __init__(self, size: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.size = diagonal(1.0), diagonal(1.0), size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h / self.size(h))


ZERO_INSIDE = torch.tensor([[0.0, 0.5, 1.0, 2.0]])


def added(eps: float) -> Staged:
    return Staged.of(Normed(lambda h: h.abs() + eps), ZERO_INSIDE)


@pytest.fixture(scope="module")
def divided() -> Staged:
    return added(1e-8)


def test_it_keeps_the_sum_and_the_quotient_in_fp32(divided: Staged) -> None:
    assert table(divided.plan(rules_with(smallest_constant=False))) == rows(
        """
        first/linear#0 | allow | op linear     | f16 | low | f16 f16
        /abs#0         | clear | op abs        | f16 | low | .
        /add#0         | deny  | guard epsilon | f32 | -   | f32
        /div#0         | deny  | guard epsilon | f32 | -   | f32 .
        last/linear#0  | allow | op linear     | f16 | low | f16 f16
        """
    )


def test_the_sum_is_the_constant_guards_too(divided: Staged) -> None:
    assert guarded(divided.plan()) == {"/add#0": "constant", "/div#0": "epsilon"}


@pytest.mark.slow
def test_bf16_and_a_tame_eps_are_all_low(divided: Staged) -> None:
    assert all_low(divided.plan("default", BF16))
    assert all_low(added(1e-4).plan())


def test_without_it_zero_is_divided_by_zero(divided: Staged) -> None:
    assert error(divided) < 2e-3
    assert error(divided, rules_with(smallest_eps=False)) == INF


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "nodes"),
    [
        # The root of 1e-8 is 1e-4, which FP16 has; that of 1e-12 it has not.
        (lambda h: (h.relu() + 1e-8).sqrt(), {"/add#0", "/sqrt#0"}),
        (lambda h: (h.relu() + 1e-12).sqrt(), {"/add#0", "/sqrt#0", "/div#0"}),
        (lambda h: (h.relu() + 1e-8).rsqrt(), {"/add#0", "/rsqrt#0"}),
        (lambda h: (h.abs() + 1e-8).view(-1, 2, 2).view(-1, 4), {"/add#0", "/div#0"}),
    ],
)
def test_an_eps_under_a_root_or_seen_through_views(
    size: Callable[[torch.Tensor], torch.Tensor], nodes: set[str]
) -> None:
    rules = rules_with(rule("infer", op="aten.rsqrt"), activation_headroom=False)
    staged = Staged.of(Normed(size), ZERO_INSIDE)
    assert set(guarded(staged.plan(rules))) == nodes
    assert error(staged, rules) < 2e-3


@pytest.mark.slow
def test_a_clamp_keeps_from_zero_as_well() -> None:
    staged = Staged.of(Normed(lambda h: h.abs().clamp(min=1e-8)), ZERO_INSIDE)
    assert guarded(staged.plan()) == {"/clamp#0": "constant", "/div#0": "epsilon"}
    assert error(staged) < 2e-3


@pytest.mark.slow
def test_an_eps_may_be_a_buffer() -> None:
    eps = torch.tensor(1e-8)
    staged = Staged.of(Normed(lambda h: h.abs() + eps), ZERO_INSIDE)
    assert "/div#0" in guarded(staged.plan())
    assert error(staged) < 2e-3
