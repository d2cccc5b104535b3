"""Axes, round numbers and paths."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.report.charts.svg import Axis, decades, dots, line, log2, log10, round_numbers


def test_an_axis_is_linear_in_its_measure_and_holds_what_lies_beyond_at_its_ends() -> None:
    axis = Axis(-4, 0, 200, 100, log10)
    assert [axis.at(value) for value in (1e-4, 1e-3, 1e-1, 1)] == [200, 175, 125, 100]
    assert [axis.at(value) for value in (1e-9, 0, -5, 7, math.inf)] == [200, 200, 200, 100, 100]
    assert axis.place(-2) == axis.at(1e-2) == 150
    assert Axis(0, 3, 0, 10, log2).at(4) == 6.7


@pytest.mark.parametrize(
    ("values", "powers"),
    [
        ([3e-4, 2e-2], (-4, -1)),
        ([1e-2], (-3, -2)),
        ([1e-30, 1.0], (-8, 0)),
        ([None, math.nan, math.inf, 0.0, -3.0, 20.0], (1, 2)),
        ([0.0, math.nan], None),
        ([], None),
    ],
)
def test_decades_enclose_what_has_a_logarithm(
    values: list[float | None], powers: tuple[int, int] | None
) -> None:
    assert decades(values, 8) == powers


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (0.06, 2.33, [0, 0.5, 1, 1.5, 2, 2.5]),
        (1, 50, [0, 10, 20, 30, 40, 50]),
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (-7, 7, [-10, -5, 0, 5, 10]),
        (2.8e-6, 5.8e-6, [2e-6, 3e-6, 4e-6, 5e-6, 6e-6]),
    ],
)
def test_round_numbers_are_what_a_person_would_choose(
    low: float, high: float, numbers: list[float]
) -> None:
    assert round_numbers(low, high, 5) == numbers


def test_steps_are_no_smaller_than_asked() -> None:
    assert round_numbers(15, 17, 10, least=1) == [15, 16, 17]
    assert round_numbers(15.5, 15.6, 10, least=1) == [15, 16]


_NUMBERS = st.floats(-1e300, 1e300)


@given(_NUMBERS, _NUMBERS, st.integers(2, 12))
def test_round_numbers_enclose_any_range_and_stay_few(one: float, other: float, most: int) -> None:
    low, high = sorted((one, other))
    if low == high:
        return
    numbers = round_numbers(low, high, most)
    slack = 1e-6 * (numbers[1] - numbers[0])
    assert numbers[0] <= low + slack
    assert numbers[-1] >= high - slack
    assert 2 <= len(numbers) <= 2.5 * most + 3
    assert numbers == sorted(set(numbers))


def test_paths() -> None:
    assert line([(1, 2.5), (3, 4)]) == "M1 2.5L3 4"
    assert line([(1, 2.5)]) == "M1 2.5h0"
    assert line([]) == ""
    assert dots([(1, 2.5), (3, 4)]) == "M1 2.5h0M3 4h0"
