"""The paired test against SciPy, at its edges, under symmetries, and on simulated seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.validate.training.margin import Margin, MarginSource
from amp_convert.validate.training.noninferiority import (
    ALPHA,
    LOOKS,
    Noninferiority,
    judge_pairs,
    student_t_quantile,
)
from tests.validate.training.judged_seeds import FP32, judged

NAN, INF = math.nan, math.inf


MIXED = [0.915, 0.913, 0.911, 0.919, 0.917, 0.918, 0.915, 0.911, 0.921, 0.912, 0.915, 0.917]


def differing(differences: list[float], margin: float = 1.0) -> Noninferiority:
    return judged(differences, [0.0] * len(differences), margin=margin)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.5001, 0.9, 0.975, 1 - ALPHA, 0.9999])
def test_student_t_quantile_is_scipy_s(probability: float) -> None:
    degrees = [*range(1, 31), 100, 101]
    found = [student_t_quantile(probability, each) for each in degrees]
    assert found == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_student_t_quantile_is_that_of_printed_tables() -> None:
    found = [round(student_t_quantile(0.975, degrees), 3) for degrees in (1, 4, 7, 11)]
    assert found == [12.706, 2.776, 2.365, 2.201]


@pytest.mark.parametrize(("probability", "degrees"), [(0.5, 4), (1.0, 4), (0.2, 4), (0.9, 0)])
def test_student_t_quantile_refuses_what_it_cannot_give(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_t_quantile(probability, degrees)


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_each_look_is_scipy_s_paired_interval(lower_is_better: bool) -> None:
    answer = judged(MIXED, margin=5e-4, lower_is_better=lower_is_better)
    assert [look.n for look in answer.looks] == list(LOOKS)
    arms = (FP32, MIXED) if lower_is_better else (MIXED, FP32)
    for look in answer.looks:
        better, worse = (arm[: look.n] for arm in arms)
        # Bounds at ALPHA on each side are the two-sided interval at 1 - 2 ALPHA.
        interval = stats.ttest_rel(better, worse).confidence_interval(1 - 2 * ALPHA)
        assert (look.lower, look.upper) == pytest.approx((interval.low, interval.high), rel=1e-9)
        differences = np.subtract(better, worse)
        assert look.mean == pytest.approx(differences.mean(), rel=1e-9)
        assert look.std == pytest.approx(differences.std(ddof=1), rel=1e-9)
    assert answer.last == answer.looks[-1]


def test_alpha_is_the_notes_split_over_three_looks() -> None:
    assert LOOKS == (5, 8, 12)
    assert pytest.approx(0.05 / 3) == ALPHA


# --- the answers ---------------------------------------------------------------------------------


def test_equal_training_passes_at_the_first_look() -> None:
    answer = judged(MIXED[:5])
    assert (answer.status, answer.seeds_needed, answer.pairs) == ("pass", 0, 5)
    assert [(look.n, look.status) for look in answer.looks] == [(5, "pass")]
    assert answer.reason == (
        "after 5 seeds the mean difference (above 0 mixed is better) is above -0.00303 with "
        "98.3 % confidence: within the margin of 0.01 (the given tolerance)"
    )


def test_worse_training_fails_at_the_first_look() -> None:
    answer = judged([value - 0.05 for value in MIXED[:5]])
    assert (answer.status, answer.seeds_needed) == ("fail", 0)
    assert answer.reason == (
        "after 5 seeds the mean difference (above 0 mixed is better) is below -0.04497 with "
        "98.3 % confidence: beyond the margin of 0.01 (the given tolerance)"
    )


def test_a_loss_that_is_not_significant_is_no_pass() -> None:
    differences = [-0.6, 0.5, -0.9, 0.7, -0.4]
    assert stats.ttest_1samp(differences, 0).pvalue > 0.5
    answer = differing(differences, margin=0.5)
    assert (answer.status, answer.seeds_needed) == ("inconclusive", 3)


def test_a_better_model_passes_whatever_its_margin() -> None:
    assert judged([value + 0.05 for value in MIXED[:5]], margin=1e-6).status == "pass"


@pytest.mark.parametrize(("seeds", "needed"), [(0, 5), (1, 4), (4, 1)])
def test_before_five_seeds_the_missing_ones_are_counted(seeds: int, needed: int) -> None:
    answer = judged(MIXED[:seeds])
    assert (answer.status, answer.seeds_needed, answer.looks) == ("inconclusive", needed, ())
    assert answer.last is None
    assert answer.reason == f"the first look needs 5 seeds, and {needed} of them are missing"


@pytest.mark.parametrize(
    ("seeds", "looks", "needed"), [(5, 1, 3), (6, 1, 2), (8, 2, 4), (11, 2, 1), (12, 3, 0)]
)
def test_an_open_answer_asks_for_the_seeds_of_the_next_look(
    seeds: int, looks: int, needed: int
) -> None:
    answer = judged(MIXED[:seeds], margin=1e-4)
    assert (answer.status, len(answer.looks), answer.seeds_needed) == (
        "inconclusive",
        looks,
        needed,
    )
    end = f"needs {needed} more" if needed else "no more seeds are tried"
    assert end in answer.reason


def test_a_runner_that_asks_after_each_seed_stops_at_a_look() -> None:
    ran, margin = 0, Margin(3e-3)
    while judge_pairs(FP32[:ran], MIXED[:ran], margin, lower_is_better=False).seeds_needed:
        ran += 1
    answer = judge_pairs(FP32[:ran], MIXED[:ran], margin, lower_is_better=False)
    # The lower bounds are -0.00303 after five seeds and -0.00179 after eight.
    assert (ran, answer.status) == (8, "pass")
    # Given all at once, the looks are the same: those after the decision are not taken.
    late = judge_pairs(FP32, MIXED, margin, lower_is_better=False)
    assert (late.looks, late.status, late.pairs) == (answer.looks, "pass", 12)


def test_pairs_after_the_last_look_change_nothing() -> None:
    answer = judged([*MIXED, 0.1], [*FP32, 0.9], margin=1e-4)
    assert (answer.status, answer.seeds_needed) == ("inconclusive", 0)
    assert answer.looks == judged(MIXED, margin=1e-4).looks


def test_arms_of_unequal_length_are_refused() -> None:
    with pytest.raises(UsageError, match="FP32 arm has 6 seeds and the mixed arm 5"):
        judged(MIXED[:5], FP32[:6])


# --- no variance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_identical_arms_pass_with_an_interval_of_no_width(lower_is_better: bool) -> None:
    answer = judged(FP32[:5], margin=1e-300, lower_is_better=lower_is_better)
    assert answer.status == "pass"
    assert "is above +0 with" in answer.reason
    assert answer.last is not None
    assert (answer.last.mean, answer.last.std) == (0, 0)
    assert (answer.last.lower, answer.last.upper) == (0, 0)


@pytest.mark.parametrize(
    ("difference", "status"),
    [(-0.9, "pass"), (0.1, "pass"), (-1.1, "fail"), (-1.0, "inconclusive")],
)
def test_equal_differences_are_judged_by_their_size(difference: float, status: str) -> None:
    answer = differing([difference] * 12)
    assert answer.status == status
    assert answer.last is not None
    assert answer.last.lower == answer.last.upper == difference
    assert answer.last.n == (12 if status == "inconclusive" else 5)


@pytest.mark.parametrize(("full", "low"), [(0.90, 0.88), (0.12, 0.10), (0.3, 0.28)])
def test_rounding_never_decides_at_the_margin(full: float, low: float) -> None:
    # The float difference misses -0.02 on one side or the other.
    answer = judged([low] * 12, [full] * 12, margin=0.02)
    assert (answer.status, len(answer.looks)) == ("inconclusive", 3)


# --- metrics that are no numbers -----------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e301])
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_only_the_mixed_arm_diverging_fails(value: float, lower_is_better: bool) -> None:
    mixed = [*MIXED[:2], value]
    answer = judged(mixed, lower_is_better=lower_is_better)
    assert (answer.status, answer.seeds_needed) == ("fail", 0)
    assert (answer.failed_pairs, answer.invalid_pairs) == ((3,), ())
    said = f"the mixed arm's metric is {value} in pair 3 of 3, where FP32's is a number"
    assert answer.reason == said


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e301])
@pytest.mark.parametrize("mixed_too", [False, True])
def test_a_diverging_fp32_arm_is_no_reference(value: float, mixed_too: bool) -> None:
    fp32 = [*FP32[:4], value]
    mixed = [*MIXED[:4], NAN if mixed_too else 0.9]
    answer = judged(mixed, fp32)
    assert (answer.status, answer.seeds_needed) == ("inconclusive", 0)
    assert (answer.failed_pairs, answer.invalid_pairs) == ((), (5,))
    said = f"the FP32 arm's metric is {value} in pair 5 of 5, so it is no reference"
    assert answer.reason == said


def test_divergence_overrules_a_look_that_passed() -> None:
    answer = judged([*MIXED[:6], NAN])
    assert answer.status == "fail"
    assert [look.status for look in answer.looks] == ["pass"]
    answer = judged(MIXED[:7], [*FP32[:6], NAN])
    assert answer.status == "inconclusive"
    assert [look.status for look in answer.looks] == ["pass"]


def test_a_failed_pair_outweighs_invalid_ones_and_all_are_counted() -> None:
    answer = judged([NAN, 0.9, INF, 0.9, NAN], [NAN, NAN, 0.9, 0.9, 0.9])
    assert answer.status == "fail"
    assert (answer.failed_pairs, answer.invalid_pairs) == ((3, 5), (1, 2))
    assert answer.looks == ()
    assert "is inf in pair 3 and 1 more of 5" in answer.reason


# --- the margin ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.01, NAN, INF, -INF])
def test_a_margin_that_cannot_judge_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=rf"the margin of the training test is {value}"):
        Margin(value)


def test_a_baseline_gives_one_and_a_half_standard_deviations() -> None:
    margin = Margin.from_spread(FP32[:8])
    assert margin.value == pytest.approx(1.5 * np.std(FP32[:8], ddof=1), rel=1e-9)
    assert (margin.source, margin.seeds) == (MarginSource.BASELINE, 8)
    assert str(margin) == "0.005612 (1.5 standard deviations of 8 FP32 seeds)"
    assert judge_pairs(FP32, MIXED, margin, lower_is_better=False).margin is margin


def test_a_small_baseline_is_refused() -> None:
    with pytest.raises(UsageError, match="7 seeds, a margin needs at least 8"):
        Margin.from_spread(FP32[:7])


def test_a_baseline_without_spread_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is 0\.9 for each of its 8 seeds.*give a tolerance"):
        Margin.from_spread([0.9] * 8)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_baseline_that_diverges_is_refused(value: float) -> None:
    with pytest.raises(ModelError, match=rf"is {value} for seed 4 of 8"):
        Margin.from_spread([*FP32[:3], value, *FP32[4:8]])
