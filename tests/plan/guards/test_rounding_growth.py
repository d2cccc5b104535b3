"""Rounding errors that trials saw grow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amp_convert.plan.guards.rounding_growth import RoundingGrowth
from amp_convert.profile.growth import Growth
from tests.plan.guards.helpers import (
    INF,
    NAN,
    above,
    all_low,
    chain,
    diagonal,
    error,
    fires,
    guarded,
    said,
    site,
    spread,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = RoundingGrowth()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "limit", "expected"),
    [
        (20.0, 20.0, False),
        (above(20.0), 20.0, True),
        (5.0, 4.0, True),
        (0.0, 20.0, False),
        (NAN, 20.0, True),
        (INF, 20.0, True),
        (NAN, False, False),
        (INF, False, False),
    ],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_an_error_may_grow_as_far_as_the_limit(
    growth: float, limit: float, expected: bool, dtype: torch.dtype
) -> None:
    for seen in (Growth(inputs=growth), Growth(result=growth, reader="aten.sub in head")):
        at = site("linear", growth=seen)
        assert fires(GUARD, at, dtype, rounding_growth=limit) == expected


def test_what_was_not_tried_does_not_fire() -> None:
    assert not fires(GUARD, site("linear"))


def test_the_finding_says_whom_it_throws_off_and_how_far() -> None:
    at = site("linear", growth=Growth(40.0, 204.8, "aten.layer_norm in norm"), batches=1)
    assert said(GUARD, at) == (
        "rounding-growth",
        "its result rounded to float16 throws aten.layer_norm in norm off by 0.1 (relative L2)",
        "the rounding error grows 205 times in 1 batch",
    )
    at = site("layer_norm", growth=Growth(40.0, 3.0, "aten.sub in head"), batches=2)
    assert said(GUARD, at, BF16) == (
        "rounding-growth",
        "its inputs rounded to bfloat16 throw it off by 0.16 (relative L2)",
        "the rounding error grows 40 times in 2 batches",
    )


# --- in a plan -----------------------------------------------------------------------------------


def offset(level: float) -> nn.Sequential:
    """A layer makes values around `level`, which a normalisation takes off again."""
    up, norm = diagonal(1.0), nn.LayerNorm(4)
    up.bias = nn.Parameter(torch.full((4,), level))
    return chain(first=diagonal(1.0), up=up, norm=norm, last=diagonal(1.0))


@pytest.fixture(scope="module")
def large() -> Staged:
    return Staged.of(offset(1000.0), spread(3, 4))


def test_it_keeps_the_normalisation_and_what_it_reads_in_fp32(large: Staged) -> None:
    assert table(large.plan()) == rows(
        """
        first/linear#0    | allow | op linear             | f16 | low | f16 f16
        up/linear#0       | deny  | guard rounding-growth | f32 | -   | f32 . .
        norm/layer_norm#0 | deny  | guard rounding-growth | f32 | -   | . . .
        last/linear#0     | allow | op linear             | f16 | low | f16 f16
        """
    )


@pytest.mark.slow
def test_a_small_offset_is_left_alone() -> None:
    """Normalisation of 5 ± 0.15 lets the error grow 30 times less than that of 1000."""
    assert all_low(Staged.of(offset(0.5), spread(3, 4)).plan())


def test_the_train_graph_follows_what_was_tried_in_the_eval_graph(large: Staged) -> None:
    plan = large.plan("default", BF16)
    assert [d.rule for d in plan.train if d.rule.startswith("guard")] == [
        "guard rounding-growth",
        "guard rounding-growth",
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 5e-3), (BF16, 4e-2)])
def test_without_it_the_digits_are_lost(
    large: Staged, dtype: torch.dtype, tolerance: float
) -> None:
    assert error(large, "default", dtype) < tolerance
    assert error(large, rules_with(rounding_growth=False), dtype) > 0.3


class Sink(nn.Module):
    """One probability of nearly 1 for a value of 0: the others make the result."""

    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.full((4096, 4), 100.0))
        self.values[0] = 0.0
        self.first, self.last = diagonal(1.0), diagonal(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.first(x).repeat(1, 1024)
        scores = torch.cat([scores[:, :1] + 18.0, scores[:, 1:]], -1)
        return self.last(torch.softmax(scores, -1) @ self.values)


@pytest.mark.slow
def test_terms_that_float16_loses_are_kept_where_they_make_the_result() -> None:
    """Each is 1.5e-8, of a range up to 1: no other guard sees it."""
    staged = Staged.of(Sink(), torch.zeros(2, 4))
    assert guarded(staged.plan(rules_with(rounding_growth=20.0))) == {
        "/softmax#0": "rounding-growth",
        "/matmul#0": "rounding-growth",
    }
    assert guarded(staged.plan(rules_with(rounding_growth=20.0), BF16)) == {}
    assert error(staged) < 2e-3
    assert error(staged, rules_with()) > 0.9
