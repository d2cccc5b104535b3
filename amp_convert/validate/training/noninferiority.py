"""Is mixed training no worse than FP32 training? A paired, sequential non-inferiority test.

A difference that is "not significant" is not parity: too few seeds hide any loss. So the question
is turned round, and the answer that needs evidence is the one that a merge depends on: is the loss
smaller than a margin that was fixed before the run?

1. Pairs. Seed i fixes initial weights, data order and random state for both arms. Its difference
   is d_i = mixed - FP32 of one metric named beforehand, with the sign turned where lower is better,
   so that everywhere in this module a difference above 0 means that mixed is better.
2. Margin Δ > 0: the user's tolerance, or 1.5 standard deviations of the metric over the seeds of a
   *separate* FP32 runs of at least 8 seeds. Taking it from the seeds under test would let one
   accident both widen the margin and shift the difference.
3. Looks at n = 5, 8 and 12 pairs. Each takes the one-sided bounds mean(d) ± t · s(d) / √n, where t
   is the 1 - 0.05 / 3 quantile of Student's t with n - 1 degrees of freedom. Pass when the lower
   bound is above -Δ, fail when the upper bound is below it, else go on to the next look; after 12
   pairs, inconclusive.
4. Before statistics: a metric that is no number (NaN, infinite, or beyond 1e300) in the mixed arm
   alone fails, whatever the other pairs say. In the FP32 arm it makes the pair invalid, and the
   test inconclusive: FP32 training that diverges is no reference, and dropping the pair would be
   choosing the evidence. Both are looked for in all pairs given, used by a look or not.

Three looks that err with a chance of 0.05 / 3 each err with 0.05 at most (Bonferroni; the looks
share data, so in fact less: a model exactly at the margin passes 3.8 % of the time). That holds for
seeds that are independent of each other, with differences near enough to normal. It does not hold
for accidents: a loss that strikes one seed in ten is absent from 59 % of the first looks, and at
the margin 16 % pass when the differences are exponential, with their long tail towards losses.

An equal model passes at Δ = 1.5 s, s being the metric's true standard deviation over seeds, 89 % of
the time when the arms of a pair share nothing, and 99 % when they correlate by 0.5. A margin from
only 8 baseline seeds lowers that to 81 % and 94 %; 16 seeds give 85 % and 97 %.

Source: confidence-interval inclusion for non-inferiority (Wellek, Testing Statistical Hypotheses
of Equivalence and Noninferiority, 2nd ed. 2010). Plain numbers in, plain data out: no torch here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from amp_convert.core.errors import UsageError
from amp_convert.validate.training.margin import Margin, is_number

LOOKS = (5, 8, 12)
"""Numbers of pairs after which the test may stop."""
ALPHA = 0.05 / len(LOOKS)
"""Chance of error on one side of one look."""

# A bound this near to the margin, relative to it, lies on it, and decides nothing: 0.88 - 0.90 is
# not the float -0.02, and where all pairs differ alike such noise would be the whole evidence.
_ON_THE_MARGIN = 1e-9


class Outcome(StrEnum):
    """What the test says."""

    PASS = "pass"  # noqa: S105  no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Look:
    """The evidence of the first `n` pairs, in the metric's unit; above 0 mixed is better.

    `mean` and `std` are those of the differences, `std` with n - 1 in the divisor; `lower` and
    `upper` each bound the true mean with confidence 1 - ALPHA. An inconclusive look goes on.
    """

    n: int
    mean: float
    std: float
    lower: float
    upper: float
    status: Outcome


@dataclass(frozen=True)
class Noninferiority:
    """The answer so far, from `pairs` pairs.

    `seeds_needed` is how many more pairs the next look needs: 0 once the answer is final. `looks`
    are those taken, in order; the test stopped at the last, unless a hard failure or an invalid
    pair came first. `failed_pairs` and `invalid_pairs` number those, from 1.
    """

    status: Outcome
    reason: str
    margin: Margin
    lower_is_better: bool
    pairs: int
    seeds_needed: int
    looks: tuple[Look, ...] = ()
    failed_pairs: tuple[int, ...] = ()
    invalid_pairs: tuple[int, ...] = ()

    @property
    def last(self) -> Look | None:
        """The last look taken; None before the first."""
        return self.looks[-1] if self.looks else None


def require_test(seeds: int, *, has_margin: bool) -> None:
    """Raises UsageError unless `seeds` is 1, for no test, or can be tested against a margin: before
    the first look there is no answer, and after the last one no more use."""
    if seeds == 1:
        return
    if not LOOKS[0] <= seeds <= LOOKS[-1]:
        looks = f"{', '.join(map(str, LOOKS[:-1]))} and {LOOKS[-1]}"
        what = f"{seeds} seeds were asked for; the test looks at {looks} pairs"
        raise UsageError(what, mend=f"Give 1, or a number from {LOOKS[0]} to {LOOKS[-1]}.")
    if not has_margin:
        raise UsageError(
            "a test over seeds needs a margin that is fixed before it",
            mend="Give --margin in the metric's unit, or --fp32-seeds with a file that "
            "amp-convert fp32-seeds made.",
        )


def judge_pairs(
    fp32: Sequence[float], mixed: Sequence[float], margin: Margin, *, lower_is_better: bool
) -> Noninferiority:
    """Whether mixed training is worse than FP32 training by less than `margin`.

    `fp32[i]` and `mixed[i]` are the metric of the i-th seed, all in one unit, in the order in which
    the seeds ran. Call it with what there is after each seed, for as long as the answer's
    `seeds_needed` is not 0; pairs beyond the look that decides only count under rule 4 above.
    Raises UsageError when the arms have unequal numbers of seeds.
    """
    if len(fp32) != len(mixed):
        what = f"the FP32 arm has {len(fp32)} seeds and the mixed arm {len(mixed)}"
        raise UsageError(what, mend="Give both arms' metric of the same seeds, in the same order.")
    valid = [is_number(value) for value in fp32]
    sound = [is_number(value) for value in mixed]
    invalid_pairs = tuple(i for i, ok in enumerate(valid, 1) if not ok)
    failed_pairs = tuple(
        i for i, (ok, own) in enumerate(zip(valid, sound, strict=True), 1) if ok and not own
    )
    broken = min((*invalid_pairs, *failed_pairs), default=len(fp32) + 1)
    better, worse = (fp32, mixed) if lower_is_better else (mixed, fp32)
    arms = zip(better[: broken - 1], worse[: broken - 1], strict=True)
    looks = _take_looks([float(one) - float(other) for one, other in arms], margin.value)
    count = len(fp32)
    if failed_pairs:
        value = float(mixed[failed_pairs[0] - 1])
        status = Outcome.FAIL
        reason, needed = _say_broken("mixed", value, failed_pairs, count), 0
    elif invalid_pairs:
        value = float(fp32[invalid_pairs[0] - 1])
        status, needed = Outcome.INCONCLUSIVE, 0
        reason = f"{_say_broken('FP32', value, invalid_pairs, count)}, so it is no reference"
    else:
        status = looks[-1].status if looks else Outcome.INCONCLUSIVE
        more = [n - count for n in LOOKS if n > count] if status == Outcome.INCONCLUSIVE else []
        needed = more[0] if more else 0
        reason = _say(looks, margin, count, needed)
    return Noninferiority(
        status,
        reason,
        margin,
        lower_is_better,
        count,
        needed,
        looks,
        failed_pairs,
        invalid_pairs,
    )


@cache
def student_t_quantile(probability: float, degrees: int) -> float:
    """The `probability` quantile, above the median, of Student's t; a pure number.

    With θ = atan(t / √degrees) the chance of |T| < t is a finite sum for whole degrees of freedom
    (Abramowitz & Stegun 26.7.3 and 26.7.4). It grows with θ, which bisection finds to the last bit.
    Raises ValueError unless 0.5 < `probability` < 1 and `degrees` is at least 1.
    """
    if not (0.5 < probability < 1 and degrees >= 1):
        raise ValueError(f"no quantile {probability} with {degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _central_probability(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(theta: float, degrees: int) -> float:
    """The chance that |T| is below √degrees · tan(theta)."""
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= (k - 1) / k * math.cos(theta) ** 2
        total += term
    if odd:
        return (theta + math.sin(theta) * total) * 2 / math.pi
    return math.sin(theta) * total


def _take_looks(differences: Sequence[float], margin: float) -> tuple[Look, ...]:
    """The looks at `differences`, up to the first that decides."""
    looks: list[Look] = []
    for n in LOOKS:
        if n > len(differences) or (looks and looks[-1].status != Outcome.INCONCLUSIVE):
            break
        looks.append(_look(differences[:n], margin))
    return tuple(looks)


def _look(differences: Sequence[float], margin: float) -> Look:
    # `statistics` is exact: equal differences have a standard deviation of 0, not of rounding.
    n, mean = len(differences), statistics.mean(differences)
    std = statistics.stdev(differences)
    half_width = student_t_quantile(1 - ALPHA, n - 1) * std / math.sqrt(n)
    lower, upper = mean - half_width, mean + half_width
    status = Outcome.INCONCLUSIVE
    if lower > -margin * (1 - _ON_THE_MARGIN):
        status = Outcome.PASS
    elif upper < -margin * (1 + _ON_THE_MARGIN):
        status = Outcome.FAIL
    return Look(n, mean, std, lower, upper, status)


def _say_broken(arm: str, value: float, numbers: Sequence[int], count: int) -> str:
    rest = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    twin = ", where FP32's is a number" if arm == "mixed" else ""
    return f"the {arm} arm's metric is {value} in pair {numbers[0]}{rest} of {count}{twin}"


def _say(looks: Sequence[Look], margin: Margin, count: int, needed: int) -> str:
    """One sentence without a full stop, as in a check's reason."""
    if not looks:
        return f"the first look needs {LOOKS[0]} seeds, and {needed} of them are missing"
    look, level = looks[-1], f"{100 * (1 - ALPHA):.1f} %"
    after = f"after {look.n} seeds the mean difference (above 0 mixed is better)"
    if look.status == "pass":
        bound = f"is above {look.lower:+.4g} with {level} confidence"
        return f"{after} {bound}: within the margin of {margin}"
    if look.status == "fail":
        bound = f"is below {look.upper:+.4g} with {level} confidence"
        return f"{after} {bound}: beyond the margin of {margin}"
    between = f"lies between {look.lower:+.4g} and {look.upper:+.4g} at {level} confidence a side"
    undecided = f"{after} {between}, which does not decide about the margin of {margin}"
    if not needed:
        return f"{undecided}, and no more seeds are tried"
    have = f" ({count} are there)" if count > look.n else ""
    return f"{undecided}; the next look needs {needed} more{have}"
