"""Whether a loss falls is a question of order: SciPy's Kendall says the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from amp_convert.validate.training.learning import CERTAIN, Learning


@given(st.lists(st.floats(0.1, 10), min_size=8, max_size=40, unique=True))
def test_the_trend_is_that_of_kendalls_tau(losses: list[float]) -> None:
    n = len(losses)
    tau = kendalltau(range(n), losses).statistic
    z = -tau * n * (n - 1) / 2 / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    assert Learning.of(losses).z == pytest.approx(max(z, 0), abs=3 / n)


def test_luck_is_rarely_taken_for_learning() -> None:
    import torch

    g = torch.Generator().manual_seed(0)
    runs = [Learning.of((2 + torch.randn(50, generator=g)).tolist()).z for _ in range(500)]
    assert sum(z > CERTAIN for z in runs) < 0.05 * 500


@pytest.mark.parametrize("losses", [[], [1.0] * 3, [1.0, 2.0, math.nan, 1.0], [math.inf] * 9])
def test_what_shows_nothing(losses: list[float]) -> None:
    found = Learning.of(losses)
    assert math.isnan(found.z)
    assert not found.learnt
