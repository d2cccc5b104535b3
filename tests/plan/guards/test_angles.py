"""Angles whose rounding a sine shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.core.op_facts import KNOWN, Family
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.positions import Angles
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
from tests.staged import BF16, F16, Staged, rows, rule, rules_with, table

GUARD = Angles()


# --- by hand -------------------------------------------------------------------------------------

LIMIT, LIMIT_BF16 = 0.01 * 2.0**11, 0.01 * 2.0**8


@pytest.mark.parametrize(
    ("value", "radians", "dtype", "expected"),
    [
        (LIMIT, 0.01, F16, False),
        (above(LIMIT), 0.01, F16, True),
        (-above(LIMIT), 0.01, F16, True),
        (LIMIT_BF16, 0.01, BF16, False),
        (above(LIMIT_BF16), 0.01, BF16, True),
        (2048.0, 1.0, F16, False),
        (2049.0, 1.0, F16, True),
        (NAN, 0.01, F16, True),
        (INF, 0.01, F16, True),
        (NAN, 0.01, BF16, True),
        (INF, 0.01, BF16, True),
        (INF, False, F16, False),
        (NAN, False, BF16, False),
    ],
)
def test_angles_are_nearly_exact(
    value: float, radians: float, dtype: torch.dtype, expected: bool
) -> None:
    reaches = site("mul", reaches=(reader("exp", operand=1e9), reader("cos", operand=value)))
    turns = site("sin", operands=(activation(value),))
    for at in (reaches, turns):
        assert fires(GUARD, at, dtype, angle_error=radians) == expected


def test_the_finding_says_how_far_the_angle_would_be_off() -> None:
    assert said(
        GUARD, site("linear", result=7.0, reaches=(reader("sin", operand=-100.0),), batches=2)
    ) == (
        "angles",
        "it computes angles, which would be off by 0.049 radians",
        "abs max 100 in 2 batches",
    )
    assert said(GUARD, site("cos", operands=(activation(100.0),)), BF16) == (
        "angles",
        "it computes angles, which would be off by 0.39 radians",
        "abs max 100 in 1 batch",
    )


@pytest.mark.parametrize("op", [f.name for f in KNOWN if f.is_a(Family.PERIODIC)])
def test_every_periodic_operator_counts(op: str) -> None:
    assert fires(GUARD, site(op[5:], operands=(activation(100.0),)))
    assert fires(GUARD, site("mul", reaches=(reader(op[5:], operand=100.0),)))


def test_other_neighbours_do_not_fire() -> None:
    """What is read as it is but not as an angle, is small, or was not measured."""
    assert not fires(GUARD, site("tanh", operands=(activation(1e4),)))
    assert not fires(GUARD, site("mul", result=1e4, feeds=(reader("sin", operand=1e4),)))
    assert not fires(GUARD, site("mul", reaches=(reader("softmax", operand=1e4),)))
    assert not fires(GUARD, site("mul", result=1e4, reaches=(reader("sin"),)))
    assert not fires(GUARD, site("sin", operands=(Operand("self", None),)))


# --- in a plan -----------------------------------------------------------------------------------


class Wave(nn.Module):
    """Features times a frequency, and the sine of that."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.first, self.phase, self.last = diagonal(1.0), diagonal(frequency), diagonal(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.phase(self.first(x).relu()).sin())


EIGHTHS = torch.arange(1, 9.0).reshape(2, 4) / 8
"""Numbers that both low dtypes have, so that nothing is rounded but the angle."""


@pytest.fixture(scope="module")
def fast() -> Staged:
    return Staged.of(Wave(10003.0), EIGHTHS)


@pytest.mark.slow
def test_it_keeps_what_computes_the_angle_in_fp32(fast: Staged) -> None:
    assert table(fast.plan()) == rows(
        """
        first/linear#0 | allow | op linear    | f16 | low | f16 f16
        /relu#0        | clear | op relu      | f16 | low | .
        phase/linear#0 | deny  | guard angles | f32 | -   | f32 .
        /sin#0         | deny  | op sin       | f32 | -   | .
        last/linear#0  | allow | op linear    | f16 | low | f16 f16
        """
    )


SINE_TOO = rule("infer", op="aten.sin")


def test_a_sine_that_a_rule_would_make_low_is_kept_as_well(fast: Staged) -> None:
    expected = {"phase/linear#0": "angles", "/sin#0": "angles"}
    for dtype in (F16, BF16):
        assert guarded(fast.plan(rules_with(SINE_TOO), dtype)) == expected


@pytest.mark.slow
def test_tame_angles_are_all_low() -> None:
    """FP16 has room for 20 radians, BF16 for two and a half."""
    assert all_low(Staged.of(Wave(20.0), EIGHTHS).plan(rules_with(SINE_TOO)))
    assert all_low(Staged.of(Wave(2.5), EIGHTHS).plan(rules_with(SINE_TOO), BF16))
    assert guarded(Staged.of(Wave(3.0), EIGHTHS).plan("default", BF16)) == {
        "phase/linear#0": "angles"
    }


@pytest.mark.slow
def test_what_is_added_to_an_angle_and_what_it_is_multiplied_with_compute_it_too() -> None:
    class Shifted(Wave):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.last((self.phase(h) * 2 + h.unsqueeze(0)).squeeze(0).sin())

    staged = Staged.of(Shifted(1000.0), spread(2, 4))
    assert guarded(staged.plan(rules_with(SINE_TOO))) == dict.fromkeys(
        (
            "first/linear#0",
            "phase/linear#0",
            "/mul#0",
            "/unsqueeze#0",
            "/add#0",
            "/squeeze#0",
            "/sin#0",
        ),
        "angles",
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 2e-3), (BF16, 2e-2)])
def test_without_it_the_sine_is_another(fast: Staged, dtype: torch.dtype, tolerance: float) -> None:
    assert error(fast, "default", dtype) < tolerance
    assert error(fast, rules_with(angle_error=False), dtype) > 0.5
