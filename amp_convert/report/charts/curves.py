"""Values over the steps of training as SVG path data.

Steps that share a column, two units wide, become one point, or two where both their lowest and
their highest value matter: so a path stays small however many steps there are. What is not finite,
or too large to be subtracted, has no place on an axis; a column without any other value breaks the
line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from amp_convert.report.charts.svg import Axis, line

Point = tuple[float, float]
"""A coordinate of the steps' axis, and a value."""
_COLUMN = 2
_LARGEST = 1e300


def drawable(value: float) -> bool:
    """Whether a value has a place on an axis."""
    return abs(value) <= _LARGEST  # False for NaN


def steps_a_point(x: Axis) -> int:
    """About how many steps share a column; 1 where each has its own."""
    return max(1, round(_COLUMN * (x.high - x.low) / (x.end - x.start)))


def mean(found: Sequence[Point]) -> list[Point]:
    """The mean of a column, in its middle."""
    return [(_middle(found), math.fsum(value / len(found) for _, value in found))]


def highest(found: Sequence[Point]) -> list[Point]:
    """The largest value of a column."""
    return [max(found, key=_value)]


def both_ends(found: Sequence[Point]) -> list[Point]:
    """The smallest and the largest value of a column, in the order of their steps."""
    return sorted({min(found, key=_value), max(found, key=_value)})


def points(
    values: Sequence[float], x: Axis, reduce: Callable[[Sequence[Point]], list[Point]]
) -> list[list[Point]]:
    """The values of the steps from 1 on, each column reduced, in stretches without a gap."""
    return [
        [point for found in columns for point in reduce(found)]
        for drawn, columns in itertools.groupby(_columns(values, x), key=bool)
        if drawn
    ]


def curve(
    values: Sequence[float],
    x: Axis,
    y: Axis,
    reduce: Callable[[Sequence[Point]], list[Point]] = mean,
) -> str:
    """A line from value to value."""
    stretches = points(values, x, reduce)
    return "".join(line([(place, y.at(value)) for place, value in found]) for found in stretches)


def staircase(values: Sequence[float], x: Axis, y: Axis) -> str:
    """A line that goes along and up or down only, with a corner where the value changes."""
    parts = []
    for stretch in points(values, x, both_ends):
        place, height = stretch[0][0], y.at(stretch[0][1])
        parts.append(f"M{place:g} {height:g}")
        for at, value in stretch[1:]:
            if (new := y.at(value)) != height:
                parts.append(f"H{at:g}V{new:g}")
                height = new
        parts.append(f"H{stretch[-1][0]:g}")
    return "".join(parts)


def _columns(values: Sequence[float], x: Axis) -> Iterator[list[Point]]:
    """The drawable values of each column; an empty list where there are none."""
    placed = ((x.at(step), value) for step, value in enumerate(values, 1))
    for _, members in itertools.groupby(placed, key=lambda point: int(point[0] // _COLUMN)):
        yield [point for point in members if drawable(point[1])]


def _middle(found: Sequence[Point]) -> float:
    return round((found[0][0] + found[-1][0]) / 2, 1)


def _value(point: Point) -> float:
    return point[1]
