"""How much worse a metric may be: a tolerance, or 1.5 standard deviations over FP32 seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from amp_convert.core.errors import ModelError, UsageError

MIN_SPREAD_SEEDS = 8


SPREAD_FACTOR = 1.5


class MarginSource(StrEnum):
    """Where a margin came from."""

    TOLERANCE = "tolerance"
    BASELINE = "baseline"


@dataclass(frozen=True)
class Margin:
    """How much worse the mean of the metric may be, in the metric's own unit.

    `seeds` and `std` describe the FP32 seeds that it was taken from, and are None for a
    tolerance. Raises UsageError unless `value` is a finite number above 0: at 0 nothing but a
    better model could pass, and without a bound anything would.
    """

    value: float
    source: MarginSource = MarginSource.TOLERANCE
    seeds: int | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            what = f"the margin of the training test is {self.value}"
            raise UsageError(what, mend="Give a finite number above 0, in the metric's unit.")

    @classmethod
    def from_spread(cls, metric: Sequence[float]) -> Margin:
        """1.5 times the standard deviation of `metric`, one FP32 value a seed, in its own unit.

        The seeds must be others than those of the test. Raises UsageError for fewer than 8, and
        when all values are equal, which gives no margin; ModelError for a value that is no number.
        """
        values = [float(value) for value in metric]
        count, mend = len(values), "Train more seeds, or give a tolerance."
        if count < MIN_SPREAD_SEEDS:
            least = f"a margin needs at least {MIN_SPREAD_SEEDS}"
            raise UsageError(f"the file of FP32 seeds has {count} seeds, {least}", mend=mend)
        for index, value in enumerate(values):
            if not is_number(value):
                what = f"the metric of the FP32 seeds is {value} for seed {index + 1} of {count}"
                raise ModelError(what, mend="Make the FP32 training stable first.")
        std = statistics.stdev(values)
        if std == 0:
            what = f"the metric of the FP32 seeds is {values[0]:g} for each of its {count} seeds"
            mend = "That gives no margin: give a tolerance instead."
            raise UsageError(what, mend=mend)
        return cls(SPREAD_FACTOR * std, MarginSource.BASELINE, count, std)

    def __str__(self) -> str:
        if self.source is MarginSource.TOLERANCE:
            return f"{self.value:.4g} (the given tolerance)"
        origin = f"{SPREAD_FACTOR:g} standard deviations of {self.seeds} FP32 seeds"
        return f"{self.value:.4g} ({origin})"


def require_spread(seeds: int) -> None:
    """Raises UsageError for fewer seeds than a file of FP32 seeds needs."""
    if seeds < MIN_SPREAD_SEEDS:
        what = f"{seeds} FP32 seeds were asked for; a margin needs at least "
        mend = f"Give --seeds {MIN_SPREAD_SEEDS} or more."
        raise UsageError(f"{what}{MIN_SPREAD_SEEDS}", mend=mend)


# Larger values are as good as infinite: their differences and squares could overflow.
LARGEST = 1e300


def is_number(value: float) -> bool:
    return abs(value) <= LARGEST  # False for NaN
