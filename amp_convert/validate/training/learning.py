"""Has a training run learnt anything? Judged on its losses: does the loss fall, and far enough?

That it falls is a question of order, so that neither the spread from batch to batch nor how fast it
falls matters: Mann and Kendall's test for a trend. With S the number of pairs of steps of which the
later has the smaller loss, less those of which it has the larger, z = (S - 1) / sqrt(n (n - 1)
(2 n + 5) / 18), which is normal where there is no trend (H. B. Mann, 1945).

How far is the mean of the first quarter less that of the last, relative to that. Less than
`LEAST_GAIN` could have come of nothing: the losses of two arms may differ by half of that.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CERTAIN = 2.0
"""The z from which on a trend is no luck."""
LEAST_GAIN = 0.04


@dataclass(frozen=True)
class Learning:
    """The mean loss of the first and of the last quarter of the steps, and the z of the trend; NaN
    for fewer than four losses, or losses that are no numbers."""

    first: float
    last: float
    z: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> Learning:
        """What a list of losses, one a step, shows."""
        count = len(losses)
        if count < 4 or not all(map(math.isfinite, losses)):
            return cls(math.nan, math.nan, math.nan)
        score, before = 0, list[float]()
        for done, loss in enumerate(losses):
            smaller, upto = bisect.bisect_left(before, loss), bisect.bisect_right(before, loss)
            score += (done - upto) - smaller  # of those before it, more were larger
            before.insert(upto, loss)
        spread = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
        quarter = max(1, count // 4)
        first, last = (statistics.fmean(part) for part in (losses[:quarter], losses[-quarter:]))
        return cls(first, last, max(score - 1, 0) / spread)

    @property
    def gain(self) -> float:
        """How far the loss fell, relative to where it ended."""
        fell = self.first - self.last
        if not self.last:
            return math.copysign(math.inf, fell) if fell else 0.0
        return fell / abs(self.last)

    @property
    def learnt(self) -> bool:
        """Whether the loss fell, and far enough."""
        return self.z > CERTAIN and self.gain > LEAST_GAIN
