"""Prepared model and goals -> `Tuned`.

1. The plan with nothing kept in FP32 for loss of precision is attributed: each layer's part of the
   error, and what it would cost in FP32.
2. An integer programme chooses the cheapest set that is predicted to be within the tolerance (see
   `search`), the plan is tried, and the prediction is corrected by what was measured: until the
   goals are reached, at most `MOST_TRIALS` times.
3. What was kept too much is given back: the programme is solved again with what was learnt.
4. The frontier: the same scores are solved for other tolerances, and each plan is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amp_convert.attribute.results import root_of_squares
from amp_convert.core.errors import UsageError
from amp_convert.tune.results import Border, Cost, Goals, Point, Tuned, Unit
from amp_convert.tune.search import cheapest
from amp_convert.tune.trials import Bench

MOST_TRIALS = 12
FRONTIER = 12
"""How many tolerances are solved for the frontier."""
_LOOSEST, _TIGHTEST = 1.0, 0.02
_SLACK = 0.97
"""Predictions aim so far under the tolerance."""
_NEAR = 1.05
"""Two bounds that are no further apart are one."""


@dataclass(frozen=True)
class Scores:
    """What the search knows: units, borders, and what a price rests on."""

    units: tuple[Unit, ...]
    borders: tuple[Border, ...]
    cost: Cost

    def predicted(self, kept: frozenset[str]) -> float:
        """The predicted error of the plan that keeps these units."""
        borders = (b.error for b in self.borders if b.source in kept and b.reader not in kept)
        low = (u.error for u in self.units if u.name not in kept)
        return root_of_squares((*low, *borders))

    def price(self, kept: frozenset[str]) -> float:
        """What keeping these units costs, casts included."""
        borders = (b.price for b in self.borders if (b.source in kept) != (b.reader in kept))
        return sum(u.price for u in self.units if u.name in kept) + sum(borders)


def tune(
    bench: Bench,
    scores: Scores,
    goals: Goals,
    lower_is_better: frozenset[str],
    tick: Callable[[], None],
) -> Tuned:
    """Search and measure. Raises UsageError for goals that cannot be told apart from none: an
    unknown metric, one that is NaN in FP32."""
    given = bench.given()
    tick()
    search = _Search(bench, scores, goals, lower_is_better, tick)
    lowest = search.tried(frozenset())
    search.check_metric()
    chosen = search.run()
    trials = len(bench.points)
    reached = search.meets(chosen)
    return Tuned(
        goals=goals,
        cost=scores.cost,
        reached=reached,
        chosen=chosen,
        given=given,
        lowest=lowest,
        units=scores.units,
        fp32_metrics=bench.fp32_metrics(),
        frontier=search.frontier(),
        trials=trials,
    )


class _Search:
    def __init__(
        self,
        bench: Bench,
        scores: Scores,
        goals: Goals,
        lower_is_better: frozenset[str],
        tick: Callable[[], None],
    ) -> None:
        self._bench, self._scores, self._goals = bench, scores, goals
        self._lower_is_better, self._tick = lower_is_better, tick
        self._factor = 1.0
        """Measured over predicted, of the last plan that tells."""

    def tried(self, kept: frozenset[str]) -> Point:
        fresh = kept not in self._bench.points
        predicted, price = self._scores.predicted(kept), self._scores.price(kept)
        point = self._bench.tried(kept, self._scores.units, predicted, price)
        if fresh:
            self._tick()
        if predicted and math.isfinite(point.error) and math.isfinite(predicted):
            self._factor = point.error / predicted
        return point

    def run(self) -> Point:
        """The cheapest plan found that meets the goals, or else the nearest.

        The bound on the predicted error is bracketed: `good` is the largest at which the plan was
        right, `bad` the smallest at which it was not. Between the two the next bound is that at
        which the last plan's prediction would be the tolerance, or their mean.
        """
        lowest = self.tried(frozenset())
        if self.meets(lowest):
            return lowest
        right: list[frozenset[str]] = []
        good, bad = 0.0, self._scores.predicted(frozenset())
        bound = self._next(good, bad)
        while len(self._bench.points) < MOST_TRIALS - 1 and bad > good * _NEAR and bound > 0:
            kept = self._solved(bound)
            if self._too_wrong(self.tried(kept)):
                bad = bound
            else:
                good = bound
                right.append(kept)
            if good == 0.0 and kept == self._everything:
                break
            bound = self._next(good, bad)
        if not right:
            self.tried(self._everything)
            right = [self._everything]
        meeting = [kept for kept in right if self.meets(self.tried(kept))]
        return self._best(meeting) if meeting else self._nearest()

    def _next(self, good: float, bad: float) -> float:
        if not math.isfinite(bad):
            return sum(u.error for u in self._scores.units if math.isfinite(u.error)) or 1.0
        aimed = (self._goals.tolerance or 0.0) * _SLACK / (self._factor or 1.0)
        if good * _NEAR < aimed < bad / _NEAR:
            return aimed
        return math.sqrt(good * bad) if good else bad / 4

    def _best(self, plans: Sequence[frozenset[str]]) -> Point:
        """The fastest, or the cheapest where prices are not measured."""
        points = [self.tried(kept) for kept in plans]
        return max(points, key=lambda point: worth(point, self._scores.cost))

    @property
    def _everything(self) -> frozenset[str]:
        return frozenset(unit.name for unit in self._scores.units)

    def _solved(self, bound: float) -> frozenset[str]:
        found = cheapest(self._scores.units, self._scores.borders, bound)
        return self._everything if found is None else found

    def meets(self, point: Point) -> bool:
        """Whether a plan reaches every goal."""
        return not self._too_wrong(point) and not self._too_slow(point)

    def _too_wrong(self, point: Point) -> bool:
        goals = self._goals
        if goals.tolerance is not None and not point.error <= goals.tolerance:
            return True
        if goals.max_drop is None:
            return False
        have, want = dict(point.metrics).get(goals.metric), self._fp32(goals.metric)
        if have is None or want is None:
            return True
        lost = have - want if goals.metric in self._lower_is_better else want - have
        return not lost <= goals.max_drop

    def _too_slow(self, point: Point) -> bool:
        return self._goals.speed is not None and not point.speedup >= self._goals.speed

    def _fp32(self, metric: str) -> float | None:
        return dict(self._bench.fp32_metrics()).get(metric)

    def check_metric(self) -> None:
        """Refuse a metric that nothing can be held to."""
        if self._goals.max_drop is None:
            return
        known: Mapping[str, float] = dict(self._bench.fp32_metrics())
        value = known.get(self._goals.metric)
        if value is None:
            raise UsageError(
                f"there is no metric {self._goals.metric}",
                mend=f"There are: {', '.join(known)}." if known else "Define metrics().",
            )
        if not math.isfinite(value):
            raise UsageError(
                f"the metric {self._goals.metric} is {value} in FP32",
                mend="Give a metric that is a number for the FP32 model.",
            )

    def _nearest(self) -> Point:
        """Of all that was tried: the fastest plan that is right, or else the one of the smallest
        error."""
        points = [*self._bench.points.values()]
        right = [point for point in points if not self._too_wrong(point)]
        if right:
            return max(right, key=lambda point: point.speedup)
        return min(points, key=lambda point: _size(point.error))

    def frontier(self) -> tuple[Point, ...]:
        """Measured plans that no other is better than in both, from the smallest error."""
        lowest = self.tried(frozenset())
        for step in range(FRONTIER):
            share = _LOOSEST * (_TIGHTEST / _LOOSEST) ** (step / (FRONTIER - 1))
            bound = self._scores.predicted(frozenset()) * share
            if math.isfinite(bound):
                kept = cheapest(self._scores.units, self._scores.borders, bound)
                if kept is not None:
                    self.tried(kept)
        return undominated([*self._bench.points.values(), lowest], self._scores.cost)


def undominated(points: Sequence[Point], cost: Cost) -> tuple[Point, ...]:
    """Those that no other beats in error and in speed, or in price where that is not measured, from
    the smallest error."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (_size(p.error), -worth(p, cost))):
        if not found or worth(point, cost) > worth(found[-1], cost):
            found.append(point)
    return tuple(found)


def worth(point: Point, cost: Cost) -> float:
    """What a plan is chosen by, among those that are right: more is better."""
    return point.speedup if cost is Cost.MEASURED else -point.price


def _size(error: float) -> float:
    return math.inf if math.isnan(error) else error
