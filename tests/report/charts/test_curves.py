"""Values over steps as path data."""

from __future__ import annotations

import math

import pytest

from amp_convert.report.charts.curves import (
    both_ends,
    curve,
    drawable,
    highest,
    mean,
    points,
    staircase,
    steps_a_point,
)
from amp_convert.report.charts.svg import Axis

# A unit a step: two or three steps share a column of two units.
X = Axis(1, 11, 0, 10)
Y = Axis(0, 10, 100, 0)
VALUES = [1.0, 5.0, 3.0, math.nan, math.inf, -math.inf, 2.0, 2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e301])
def test_what_has_no_place_on_an_axis(value: float) -> None:
    assert not drawable(value)
    assert drawable(-1e300)


def test_a_column_becomes_its_mean_its_highest_or_both_ends() -> None:
    # Steps 1 and 2 are at 0 and 1; 3 and 4 at 2 and 3; nothing is at 4 and 5; then 6 and 7.
    assert points(VALUES, X, mean) == [[(0.5, 3.0), (2.0, 3.0)], [(6.5, 2.0)]]
    assert points(VALUES, X, highest) == [[(1.0, 5.0), (2.0, 3.0)], [(6.0, 2.0)]]
    assert points(VALUES, X, both_ends) == [[(0.0, 1.0), (1.0, 5.0), (2.0, 3.0)], [(6.0, 2.0)]]


def test_how_many_steps_share_a_column() -> None:
    assert [steps_a_point(Axis(1, last, 58, 946)) for last in (2, 444, 4_440)] == [1, 1, 10]


def test_a_mean_of_large_numbers_is_finite() -> None:
    assert points([1e300] * 2, X, mean) == [[(0.5, 1e300)]]


def test_a_curve_is_broken_where_there_is_nothing_to_draw() -> None:
    assert curve(VALUES, X, Y) == "M0.5 70L2 70M6.5 80h0"
    assert curve(VALUES, X, Y, highest) == "M1 50L2 70M6 80h0"
    assert curve([math.nan], X, Y) == ""


def test_a_staircase_has_corners_where_the_value_changes_only() -> None:
    wide = Axis(1, 5, 0, 40)
    assert staircase([4.0, 4.0, 2.0, 2.0, 4.0], wide, Y) == "M0 60H20V80H40V60H40"
    assert staircase([4.0], wide, Y) == "M0 60H0"
