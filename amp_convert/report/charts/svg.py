"""What the report's charts share: their width, axes from numbers to SVG coordinates, and paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, LEFT, RIGHT, TOP = 960, 58, 946, 24
"""How wide a chart is, and where what is drawn on its axes lies: its lower edge is its own."""


@dataclass(frozen=True)
class Mark:
    """A point with a label."""

    x: float
    y: float
    label: str


def log10(value: float) -> float:
    """The decimal logarithm; that of a number which is not above 0 lies under every axis."""
    return math.log10(value) if value > 0 else -math.inf


def log2(value: float) -> float:
    """The binary logarithm; that of a number which is not above 0 lies under every axis."""
    return math.log2(value) if value > 0 else -math.inf


@dataclass(frozen=True)
class Axis:
    """Takes a number whose `measure` is `low` to `start`, and `high` to `end`, in SVG user units.

    What lies beyond either end is put on it.
    """

    low: float
    high: float
    start: float
    end: float
    measure: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """The coordinate of `value`, which is not NaN."""
        return self.place(self.measure(value))

    def place(self, measured: float) -> float:
        """The coordinate of a value whose measure is known."""
        share = (measured - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * min(max(share, 0.0), 1.0), 1)


def decades(values: Iterable[float | None], most: int) -> tuple[int, int] | None:
    """The powers of ten that enclose the finite numbers above 0, and at most so many of them, the
    smaller ones left out; None without any number."""
    powers = [math.log10(v) for v in values if v is not None and math.isfinite(v) and v > 0]
    if not powers:
        return None
    high = math.ceil(max(powers))
    return max(min(math.floor(min(powers)), high - 1), high - most), high


def round_numbers(low: float, high: float, most: int, least: float = 1e-290) -> list[float]:
    """Numbers in equal steps of 1, 2 or 5 times a power of ten, and no less than `least`, that
    enclose `low` to `high`; about `most` of them. `low` is below `high`."""
    rough = max((high - low) / most, math.ulp(max(abs(low), abs(high))), least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    numbers = range(first, max(last, first + 1) + 1)
    if step >= 1:
        return [number * step for number in numbers]
    parts = round(1 / step)  # dividing gives 0.3, where 3 * 0.1 is 0.30000000000000004
    return [number / parts for number in numbers]


def line(points: Sequence[tuple[float, float]]) -> str:
    """Path data of a line through the points; a single one is a dot where line ends are round."""
    drawn = "".join(f"{'L' if place else 'M'}{x:g} {y:g}" for place, (x, y) in enumerate(points))
    return drawn + "h0" if len(points) == 1 else drawn


def dots(points: Iterable[tuple[float, float]]) -> str:
    """Path data of lines without length: dots where line ends are round."""
    return "".join(f"M{x:g} {y:g}h0" for x, y in points)
