"""Logits whose rounding a softmax turns into an error of its probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.logits import Logits
from amp_convert.profile.calibrate import Range
from tests.plan.guards.helpers import (
    INF,
    NAN,
    above,
    activation,
    all_low,
    diagonal,
    error,
    fires,
    guarded,
    reader,
    said,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = Logits()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "limit", "dtype", "expected"),
    [
        (512.0, 0.25, F16, False),
        (above(512.0), 0.25, F16, True),
        (64.0, 0.25, BF16, False),
        (above(64.0), 0.25, BF16, True),
        (2048.0, 1.0, F16, False),
        (above(2048.0), 1.0, F16, True),
        (NAN, 0.25, F16, True),
        (INF, 0.25, F16, True),
        (NAN, 0.25, BF16, True),
        (INF, 0.25, BF16, True),
        (INF, False, F16, False),
        (NAN, False, BF16, False),
    ],
)
def test_the_largest_logit_is_nearly_exact(
    value: float, limit: float, dtype: torch.dtype, expected: bool
) -> None:
    reaches = site("linear", reaches=(reader("sin", operand=1e9), reader("exp", operand=value)))
    is_one = site("softmax", operands=(activation(value),))
    for at in (reaches, is_one):
        assert fires(GUARD, at, dtype, logit_error=limit) == expected


def test_what_lies_far_below_the_maximum_does_not_count() -> None:
    """The exponential of a mask is zero, whatever becomes of its digits."""
    masked, all_far_down = Range(1e9, 3.0), Range(1e9, -1e4)
    for range_, expected in ((masked, False), (all_far_down, True)):
        assert fires(GUARD, site("softmax", operands=(Operand("self", range_),))) == expected


def test_the_finding_says_how_far_the_largest_would_be_off() -> None:
    assert said(GUARD, site("add", reaches=(reader("softmax", operand=1000.0),))) == (
        "logits",
        "it computes logits, the largest of which would be off by 0.49",
        "max 1000",
    )
    at = site("_log_softmax", operands=(Operand("self", Range(1e9, -100.0)),))
    assert said(GUARD, at, BF16) == (
        "logits",
        "it computes logits, the largest of which would be off by 0.39",
        "max -100",
    )


@pytest.mark.parametrize("op", [f.name for f in KNOWN if f.exponentiates])
def test_every_exponential_counts(op: str) -> None:
    assert fires(GUARD, site(op[5:], operands=(activation(1000.0),)))
    assert fires(GUARD, site("mul", reaches=(reader(op[5:], operand=1000.0),)))


def test_other_neighbours_do_not_fire() -> None:
    """The weights of a loss are no logits, nor is what was not measured."""
    assert not fires(GUARD, site("cross_entropy_loss", operands=(activation(1e4, "weight"),)))
    assert not fires(GUARD, site("tanh", operands=(activation(1e4),)))
    assert not fires(GUARD, site("linear", result=1e4, feeds=(reader("softmax", operand=1e4),)))
    assert not fires(GUARD, site("linear", result=1e4, reaches=(reader("softmax"),)))


# --- in a plan -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Logits around `level`, and a mixture by their softmax."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.first, self.head, self.last = diagonal(1.0), nn.Linear(4, 4), diagonal(1.0)
        nn.init.eye_(self.head.weight)
        nn.init.constant_(self.head.bias, level)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(self.first(x)).softmax(-1))


def classifier(level: float) -> Staged:
    return Staged.of(Classifier(level), spread(2, 4, low=-2.0, high=2.0))


@pytest.fixture(scope="module")
def far() -> Staged:
    return classifier(8000.0)


@pytest.mark.slow
def test_it_keeps_the_logits_layer_and_the_softmax_in_fp32(far: Staged) -> None:
    assert table(far.plan()) == rows(
        """
        first/linear#0 | allow | op linear    | f16 | low | f16 f16
        head/linear#0  | deny  | guard logits | f32 | -   | f32 . .
        /softmax#0     | deny  | guard logits | f32 | -   | .
        last/linear#0  | allow | op linear    | f16 | low | f16 f16
        """
    )


@pytest.mark.slow
def test_tame_logits_are_all_low() -> None:
    assert all_low(classifier(50.0).plan(rules_with(), BF16))
    middle = classifier(500.0)
    assert all_low(middle.plan(rules_with()))
    assert guarded(middle.plan(rules_with(), BF16)) == {
        "head/linear#0": "logits",
        "/softmax#0": "logits",
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 2e-3), (BF16, 2e-2)])
def test_without_it_the_probabilities_are_others(
    far: Staged, dtype: torch.dtype, tolerance: float
) -> None:
    assert error(far, "default", dtype) < tolerance
    assert error(far, rules_with(logit_error=False), dtype) > 0.3
