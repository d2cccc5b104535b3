"""Laws of the test over seeds, and how often it is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import (
    LOOKS,
    judge_pairs,
)
from tests.validate.training.judged_seeds import arms, judged

# Multiples of 1/64 of moderate size: sums and differences of them are exact, so equal means equal.
grid = st.integers(-(2**16), 2**16).map(lambda number: number / 64)


pairs = st.lists(st.tuples(grid, grid), min_size=0, max_size=14)


margins = st.integers(1, 2**18).map(lambda number: number / 64)


# --- properties ----------------------------------------------------------------------------------


@given(values=pairs, margin=margins)
def test_turning_sign_and_direction_changes_nothing(
    values: list[tuple[float, float]], margin: float
) -> None:
    fp32, mixed = arms(values)
    answer = judged(mixed, fp32, margin=margin)
    turned = judged([-x for x in mixed], [-x for x in fp32], margin=margin, lower_is_better=True)
    assert (turned.status, turned.looks, turned.reason) == (
        answer.status,
        answer.looks,
        answer.reason,
    )


@given(values=pairs, margin=margins, shift=grid)
def test_shifting_both_arms_changes_nothing(
    values: list[tuple[float, float]], margin: float, shift: float
) -> None:
    fp32, mixed = arms(values)
    shifted = judged([x + shift for x in mixed], [x + shift for x in fp32], margin=margin)
    assert shifted == judged(mixed, fp32, margin=margin)


@given(values=pairs, margin=margins, exponent=st.integers(-20, 20))
def test_the_unit_of_the_metric_does_not_matter(
    values: list[tuple[float, float]], margin: float, exponent: int
) -> None:
    fp32, mixed = arms(values)
    unit = 2.0**exponent
    answer = judged(mixed, fp32, margin=margin)
    scaled = judged([x * unit for x in mixed], [x * unit for x in fp32], margin=margin * unit)
    assert [look.status for look in scaled.looks] == [look.status for look in answer.looks]
    assert [look.lower for look in scaled.looks] == [look.lower * unit for look in answer.looks]


@given(
    values=st.lists(st.tuples(grid, grid), min_size=5, max_size=12),
    order=st.permutations(range(5)),
    margin=margins,
)
def test_the_order_of_the_first_five_seeds_does_not_matter(
    values: list[tuple[float, float]], order: list[int], margin: float
) -> None:
    fp32, mixed = arms(values)
    shuffled = [values[place] for place in order] + values[5:]
    full, low = arms(shuffled)
    assert judged(low, full, margin=margin) == judged(mixed, fp32, margin=margin)


@given(values=pairs, margin=margins, wider=margins)
def test_a_wider_margin_never_takes_a_pass_away_at_a_look(
    values: list[tuple[float, float]], margin: float, wider: float
) -> None:
    fp32, mixed = arms(values)
    narrow = judged(mixed, fp32, margin=margin)
    wide = judged(mixed, fp32, margin=margin + wider)
    rank = {"fail": 0, "inconclusive": 1, "pass": 2}
    for one, other in zip(narrow.looks, wide.looks, strict=False):
        assert rank[one.status] <= rank[other.status]


@given(values=pairs, margin=margins)
def test_the_answer_follows_from_its_looks(
    values: list[tuple[float, float]], margin: float
) -> None:
    answer = judged(*reversed(arms(values)), margin=margin)
    assert [look.n for look in answer.looks] == list(LOOKS[: len(answer.looks)])
    assert all(look.status == "inconclusive" for look in answer.looks[:-1])
    assert answer.status == (answer.last.status if answer.last else "inconclusive")
    for look in answer.looks:
        assert look.lower <= look.mean <= look.upper
        assert (look.status == "pass") <= (look.lower > -margin)
        assert (look.status == "fail") <= (look.upper < -margin)
    if answer.seeds_needed:
        assert answer.status == "inconclusive"
        assert len(values) + answer.seeds_needed in LOOKS
    else:
        assert answer.status != "inconclusive" or len(values) >= LOOKS[-1]


@given(
    values=st.lists(
        st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 2), min_size=5, max_size=13
    ),
    lower_is_better=st.booleans(),
)
def test_a_pass_needs_numbers_and_any_floats_get_an_answer(
    values: list[tuple[float, float]], lower_is_better: bool
) -> None:
    fp32, mixed = arms(values)
    answer = judged(mixed, fp32, margin=1.0, lower_is_better=lower_is_better)
    if not all(map(math.isfinite, fp32 + mixed)):
        assert answer.status != "pass"
        assert answer.seeds_needed == 0
    assert "\n" not in answer.reason


@dataclass(frozen=True)
class Rates:
    """Shares of the repetitions that ended so, and the standard error of `passed`."""

    passed: float
    failed: float
    error: float


def simulate(
    repetitions: int,
    *,
    correlation: float,
    loss_in_margins: float,
    baseline_seeds: int = 0,
    lower_is_better: bool = False,
    seed: int = 0,
) -> Rates:
    """Run the shipped test on seeds of which mixed is worse by a multiple of the margin."""
    random = np.random.default_rng(seed)
    shared, *own = random.standard_normal((3, repetitions, LOOKS[-1]))
    own_share = math.sqrt(1 - correlation)
    fp32, mixed = (math.sqrt(correlation) * shared + own_share * part for part in own)
    counts = {"pass": 0, "fail": 0, "inconclusive": 0}
    sign = 1 if lower_is_better else -1
    for full, low in zip(fp32, mixed, strict=True):
        margin = Margin(1.5)
        if baseline_seeds:
            margin = Margin.from_spread(random.standard_normal(baseline_seeds).tolist())
        worse = (low + sign * loss_in_margins * margin.value).tolist()
        answer = judge_pairs(full.tolist(), worse, margin, lower_is_better=lower_is_better)
        counts[answer.status] += 1
    passed, failed = counts["pass"] / repetitions, counts["fail"] / repetitions
    return Rates(passed, failed, math.sqrt(max(passed * (1 - passed), 1e-4) / repetitions))


# --- simulated seeds -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("correlation", "baseline_seeds", "lower_is_better"),
    [(0.0, 0, False), (0.5, 0, True), (0.0, 8, False), (0.9, 8, True)],
)
def test_at_most_5_percent_pass_when_the_loss_is_the_margin(
    correlation: float, baseline_seeds: int, lower_is_better: bool
) -> None:
    rates = simulate(
        6000,
        correlation=correlation,
        loss_in_margins=1.0,
        baseline_seeds=baseline_seeds,
        lower_is_better=lower_is_better,
        seed=1,
    )
    assert rates.passed + 3 * rates.error <= 0.05
    assert rates.passed == pytest.approx(0.038, abs=4 * rates.error)
    assert rates.failed <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("correlation", "baseline_seeds", "expected"),
    [(0.0, 0, 0.895), (0.5, 0, 0.995), (0.9, 0, 1.0), (0.0, 16, 0.850), (0.5, 8, 0.945)],
)
def test_at_least_85_percent_pass_when_training_is_equal(
    correlation: float, baseline_seeds: int, expected: float
) -> None:
    rates = simulate(
        4000,
        correlation=correlation,
        loss_in_margins=0.0,
        baseline_seeds=baseline_seeds,
        seed=2,
    )
    assert rates.passed >= 0.85 - 3 * rates.error
    assert rates.passed == pytest.approx(expected, abs=4 * rates.error)
    assert rates.failed <= 0.001


@pytest.mark.slow
def test_independent_pairs_pay_for_a_margin_from_eight_seeds() -> None:
    # Short of 85 %: eight seeds are the fewest that are admitted, not the number to recommend.
    rates = simulate(4000, correlation=0.0, loss_in_margins=0.0, baseline_seeds=8, seed=3)
    assert rates.passed == pytest.approx(0.810, abs=4 * rates.error)


def test_a_loss_of_twice_the_margin_is_found() -> None:
    rates = simulate(1000, correlation=0.5, loss_in_margins=2.0, seed=4)
    assert rates.passed <= 0.001
    assert rates.failed >= 0.95
