"""Positions beyond the integers that the low dtype counts exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards.positions import Positions
from tests.plan.guards.helpers import (
    INF,
    NAN,
    activation,
    all_low,
    diagonal,
    error,
    fires,
    guarded,
    said,
    seen,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = Positions()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "steps", "dtype", "expected"),
    [
        (2048.0, 1.0, F16, False),  # the last of FP16's exact integers
        (2049.0, 1.0, F16, True),
        (-2049.0, 1.0, F16, True),
        (256.0, 1.0, BF16, False),
        (257.0, 1.0, BF16, True),
        (4096.0, 2.0, F16, False),
        (4097.0, 2.0, F16, True),
        (NAN, 1.0, F16, True),
        (INF, 1.0, F16, True),
        (NAN, 1.0, BF16, True),
        (INF, 1.0, BF16, True),
        (1e6, False, F16, False),
        (1e6, False, BF16, False),
    ],
)
def test_what_counts_stays_exact(
    value: float, steps: float, dtype: torch.dtype, expected: bool
) -> None:
    operand = site("mul", operands=(activation(0.5), activation(value, "other", integral=True)))
    result = site("mul", operands=(activation(0.5),), result=seen(value, integral=True))
    for at in (operand, result):
        assert fires(GUARD, at, dtype, position_error=steps) == expected


def test_what_does_not_count_may_be_as_large_as_it_likes() -> None:
    assert not fires(GUARD, site("mul", operands=(activation(60000.0),), result=60000.0))
    assert not fires(GUARD, site("mul"))


def test_the_finding_says_how_far_it_counts() -> None:
    at = site("mul", operands=(activation(4000.0, integral=True),), batches=2)
    reason = "it counts beyond {}'s exact integers"
    evidence = "abs max 4000 in 2 batches"
    assert said(GUARD, at) == ("positions", reason.format("float16"), evidence)
    assert said(GUARD, at, BF16) == ("positions", reason.format("bfloat16"), evidence)


# --- in a plan -----------------------------------------------------------------------------------


class Clock(nn.Module):
    """A gate that tells the steps around `start` apart."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.first, self.clock, self.last = diagonal(1.0), nn.Linear(1, 4), diagonal(1.0)
        nn.init.ones_(self.clock.weight)
        nn.init.constant_(self.clock.bias, -start)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.last(self.clock(steps[:, None].float()) * self.first(x))


def clock(start: int) -> Staged:
    return Staged.of(Clock(start), spread(3, 4), torch.tensor([-3, 1, 2]) + start)


@pytest.fixture(scope="module")
def late() -> Staged:
    return clock(3000)


def test_it_keeps_what_reads_the_position_in_fp32(late: Staged) -> None:
    assert table(late.plan()) == rows(
        """
        /slice#0       | none  |                 | i64 | -   | .
        /unsqueeze#0   | none  |                 | i64 | -   | .
        /_to_copy#0    | none  |                 | f32 | -   | .
        clock/linear#0 | deny  | guard positions | f32 | -   | . . .
        first/linear#0 | allow | op linear       | f16 | low | f16 f16
        /mul#0         | infer | op mul          | f16 | low | f16 .
        last/linear#0  | allow | op linear       | f16 | low | . f16
        """
    )


@pytest.mark.slow
def test_fewer_positions_are_all_low() -> None:
    """BF16 counts to 256 only."""
    early, middle = clock(200), clock(2000)
    assert all_low(early.plan("default", BF16))
    assert all_low(middle.plan())
    assert guarded(middle.plan("default", BF16)) == {"clock/linear#0": "positions"}


def test_without_it_positions_fall_on_their_neighbours(late: Staged) -> None:
    off = rules_with(position_error=False)
    assert error(late) < 2e-3
    assert error(late, off) > 0.2
    assert error(late, "default", BF16) < 2e-2
    assert error(late, off, BF16) > 1.0


class Stored(Clock):
    """The steps stand in a buffer."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__(3000)
        self.register_buffer("steps", torch.tensor([2997.0, 3001.0, 3002.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, self.steps[: len(x)])


@pytest.mark.slow
def test_positions_from_a_buffer_count_after_a_slice() -> None:
    staged = Staged.of(Stored(), spread(3, 4))
    assert guarded(staged.plan())["clock/linear#0"] == "positions"
    assert error(staged) < 2e-3


class Padded(nn.Module):
    """Scores with an additive mask, as BERT makes it of ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = diagonal(1.0), diagonal(1.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.first(x) + (1.0 - mask.float()) * -10000.0
        return self.last(scores.softmax(-1))


@pytest.mark.slow
def test_a_mask_of_ones_and_zeros_is_no_position() -> None:
    """Autocast handles it well: nobody needs -10000 to the last digit."""
    staged = Staged.of(Padded(), spread(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    assert guarded(staged.plan()) == {}
