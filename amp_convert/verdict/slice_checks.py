"""The checks of a verdict on the worst slices of the outputs: channels, samples, classes. Pure.

A slice that is out of tolerance in FP32's own noise too says nothing about the conversion: it does
not fail, and the reason says so. A channel that hardly varies beside the others fails, unless the
user's own metrics hold: then nobody can say whether it matters, and it is unchecked. See
`core.slices` for what a slice is, and how its error is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from amp_convert.core.slices import LEAST, SILENT, SliceError, SliceKind
from amp_convert.verdict.check import Check, CheckStatus, severity
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.validate.inference.results import OutputError

RARE = 1e-3
"""A count of changed elements is more than luck if as many were rarer than this by chance."""
LOST = 0.5
"""A class is lost where over half of its elements have another largest index. Flips between values
that are nearly equal are no more than rounding; of a whole class they are its end."""
Found = tuple["OutputError", SliceError]


def slice_checks(
    prefix: str,
    rows: Sequence[OutputError],
    missing: str,
    limits: Thresholds,
    *,
    metrics_hold: bool = False,
) -> list[Check]:
    """`prefix`.channels, .samples and .classes; the last only where an output has classes."""
    limit = limits.output_rel_l2

    def judged(what: str, *kinds: SliceKind) -> Check:
        return _spread_check(f"{prefix}.{what}s", _of(rows, *kinds), limit, missing, what)

    channels = judged("channel", SliceKind.WHOLE, SliceKind.CHANNEL)
    channels = _with(channels, judged("channel", SliceKind.FEW), _few)
    faint = partial(_faint, metrics_hold=metrics_hold)
    channels = _with(channels, judged("channel", SliceKind.FAINT_CHANNEL), faint)
    samples = judged("sample", SliceKind.SAMPLE)
    samples = _with(samples, judged("sample", SliceKind.FAINT_SAMPLE), faint)
    checks = [channels, samples]
    if classes := list(_of(rows, SliceKind.CLASS, SliceKind.LARGEST)):
        checks.append(_class_check(f"{prefix}.classes", classes, limits))
    return checks


def _with(check: Check, other: Check, made: Callable[[Check], Check]) -> Check:
    """The check, or what `made` makes of another one that fails where this one does not."""
    if check.status is CheckStatus.FAIL or other.status is not CheckStatus.FAIL:
        return check
    return made(other)


def _of(rows: Sequence[OutputError], *kinds: SliceKind) -> Iterator[Found]:
    return ((row, found) for row in rows for found in row.slices if found.kind in kinds)


def _spread_check(
    name: str, slices: Iterator[Found], limit: float, missing: str, what: str
) -> Check:
    """The worst slice that FP32's noise does not excuse, relative to its own spread."""
    found = [] if missing else list(slices)
    if not found:
        why = missing or f"no {what} has {LEAST} elements, fewer of which show no spread"
        return Check(name, CheckStatus.UNCHECKED, None, limit, why, required=False)
    excused = [(row, each) for row, each in found if _is_excused(each, limit)]
    judged = [(row, each) for row, each in found if not _is_excused(each, limit)]
    if not judged:
        row, each = max(found, key=_slice_severity)
        reason = (
            f"{called(row, each)}: error {each.error:.3g} of its spread, but FP32 nudged by one "
            f"ULP is off by {each.noise:.3g} as well: it says nothing about precision"
        )
        required = what == "channel"
        return Check(name, CheckStatus.UNCHECKED, each.error, limit, reason, required=required)
    row, worst = max(judged, key=_slice_severity)
    reason = f"{called(row, worst)}: error {worst.error:.3g} of its spread"
    holds = 0 <= worst.error <= limit
    if not holds:
        tail = f"the smallest tolerance that would pass is {worst.error:.3g}"
        reason += f" (FP32's own noise {worst.noise:.2g}); "
        reason += tail if math.isfinite(worst.error) else "no tolerance would pass"
    if excused:
        row, each = max(excused, key=_slice_severity)
        reason += (
            f"; not counted is {called(row, each)}, which FP32's own noise throws off by "
            f"{each.noise:.2g}"
        )
    return Check(name, CheckStatus.PASS if holds else CheckStatus.FAIL, worst.error, limit, reason)


def _is_excused(found: SliceError, limit: float) -> bool:
    """Whether FP32's own noise is out of tolerance; what allows nothing excuses nothing."""
    within = 0 <= found.error <= limit
    return not within and limit > SILENT and not found.noise <= limit


def _faint(check: Check, *, metrics_hold: bool) -> Check:
    reason = f"{check.reason}; it hardly varies beside the others"
    if not metrics_hold:
        return replace(check, reason=reason)
    reason += ", and your metrics hold: nobody can say whether it matters"
    return replace(check, status=CheckStatus.UNCHECKED, reason=reason)


def _few(check: Check) -> Check:
    reason = f"{check.reason}; that is of fewer than {LEAST} elements: give more batches to tell"
    return replace(check, status=CheckStatus.UNCHECKED, reason=reason)


def _class_check(name: str, classes: list[Found], limits: Thresholds) -> Check:
    """The class whose share of changed elements is furthest beyond what luck explains."""
    allowed = {SliceKind.CLASS: 1 - limits.agreement, SliceKind.LARGEST: LOST}
    if limits.output_rel_l2 == 0:
        allowed[SliceKind.LARGEST] = 0.0

    def beyond(found: Found) -> float:
        each = found[1]
        return each.error - allowed[each.kind]

    def is_wrong(share: float, each: SliceError) -> bool:
        return rarity(round(share * each.elements), each.elements, allowed[each.kind]) < RARE

    wrong = [(row, each) for row, each in classes if is_wrong(each.error, each)]
    judged = [(row, each) for row, each in wrong if not is_wrong(each.noise, each)]
    row, each = max(judged or classes, key=beyond)
    limit = 1 - allowed[each.kind]
    reason = f"{called(row, each)}: {1 - each.error:.4%} of its {each.elements} elements stay in it"
    if len(judged) < len(wrong):
        reason += f"; FP32's own noise excuses {len(wrong) - len(judged)} other class(es)"
    status = CheckStatus.FAIL if judged else CheckStatus.PASS
    return Check(name, status, 1 - each.error, limit, reason)


def rarity(count: int, total: int, share: float) -> float:
    """The probability of `count` or more of `total`, where each has the probability `share`: the
    upper tail of the binomial distribution, 1 where so many are no more than its mean."""
    if count <= total * share or share >= 1:
        return 1.0  # no fewer than are to be expected
    if share <= 0:
        return 0.0
    odds = math.log(share) - math.log1p(-share)
    term = (
        math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
        + count * math.log(share) + (total - count) * math.log1p(-share)
    )  # fmt: skip
    terms = []
    for k in range(count, total + 1):
        terms.append(math.exp(term))
        if terms[-1] < 1e-17 * terms[0] or not terms[-1]:
            break  # they fall ever faster
        term += odds + math.log(total - k) - math.log(k + 1) if k < total else 0.0
    return min(1.0, math.fsum(terms))


def called(row: OutputError, found: SliceError) -> str:
    """The slice in words: "channel 3 of dimension 1 of output logits"."""
    output = named(row)
    channel = f"channel {found.index} of dimension {found.dim} of "
    of = {
        SliceKind.WHOLE: "",
        SliceKind.CHANNEL: channel,
        SliceKind.FAINT_CHANNEL: channel,
        SliceKind.FEW: "" if found.dim is None else channel,
        SliceKind.SAMPLE: f"sample {found.index} of batch {found.batch}, ",
        SliceKind.FAINT_SAMPLE: f"sample {found.index} of batch {found.batch}, ",
        SliceKind.CLASS: f"class {found.index} of ",
        SliceKind.LARGEST: f"where index {found.index} is largest in ",
    }
    return of[found.kind] + output


def named(row: OutputError) -> str:
    """An output in words. A single tensor has no path; "output" is its name for want of one."""
    return f"output {row.name}" if row.name not in ("", "output") else "the output"


def _slice_severity(found: Found) -> float:
    return severity(found[1].error)
