"""The ways in which a run is worse than its baseline: one generator of findings a way.

Both sides come in the form of a baseline, so they are rounded alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from amp_convert.gate.baseline import Baseline
from amp_convert.report import RunReport
from amp_convert.report.records import NodeRecord
from amp_convert.verdict.thresholds import RESOLVED, metric_holds, metric_limit, rounding_unit

_AT_LEAST = ("cosine", "agreement")
"""Tolerances of which the smaller is the looser."""
LESS_WORK = 0.01
"""A share of the multiply-adds that may leave low precision before it is a finding."""
# Checks that were measured and may have no answer all the same: training is a draw, and FP32's
# noise, few samples or near ties leave a question open.
_OPEN = (
    *(f"training.{name}" for name in ("gradients", "weights", "loss", "metric", "seeds")),
    *("nodes.choices", "outputs.samples", "outputs.channels", "metrics."),
)


class RegressionKind(StrEnum):
    """What got worse."""

    VERDICT = "verdict"
    CHECK = "check"
    METRIC = "metric"
    LOOSER = "looser"
    CASTS = "casts"
    WORK = "work"
    NEWLY_FP32 = "newly-fp32"
    ERROR = "error"
    UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class Regression:
    """One thing that got worse: `subject` is the node, layer, metric, check or graph."""

    kind: RegressionKind
    subject: str
    layer: str
    before: float | str | None
    after: float | str | None
    reason: str


def worse_checks(report: RunReport, now: Baseline, before: Baseline) -> Iterator[Regression]:
    failed = [check.name for check in report.verdict.checks if check.status == "fail"]
    if failed or report.verdict.status == "fail":
        reason = f"the report's own verdict is fail: {', '.join(failed)}"
        yield Regression(RegressionKind.VERDICT, report.model.name, "", None, "fail", reason)
    reasons = {check.name: check.reason for check in report.verdict.checks}
    open_questions = undecided(report)
    for name, was in sorted(before.checks.items()):
        status = now.checks.get(name, "gone")
        if name in open_questions:
            continue
        if was != "unchecked" and status in ("unchecked", "gone"):
            reason = f"ran in the baseline and no longer does: {reasons.get(name, 'gone')}"
            yield Regression(RegressionKind.CHECK, name, "", was, status, reason)
        elif was == "pass" and status == "fail":
            reason = f"passed in the baseline: {reasons[name]}"
            yield Regression(RegressionKind.CHECK, name, "", was, status, reason)


def undecided(report: RunReport) -> dict[str, str]:
    """The checks that ran and have no answer, and why: another draw may have one. Where the verdict
    needs one, it is inconclusive, and so is the gate."""
    return {
        check.name: check.reason
        for check in report.verdict.checks
        if check.status == "unchecked" and check.value is not None and check.name.startswith(_OPEN)
    }


def worse_metrics(now: Baseline, before: Baseline, tolerance: float) -> Iterator[Regression]:
    for name, was in sorted(before.metrics.items()):
        metric = now.metrics.get(name)
        if metric is None:
            if f"metrics.{name}" not in before.checks:  # else the check that is gone says so
                reason = "in the baseline, and gone now"
                yield Regression(RegressionKind.METRIC, name, "", was.mixed, None, reason)
            continue
        lower = was.lower_is_better
        if metric.lower_is_better != lower:
            reason = "lower_is_better was changed, so the values cannot be compared"
            yield Regression(RegressionKind.METRIC, name, "", was.mixed, metric.mixed, reason)
            continue
        # On another machine a few samples may fall on the other side: as many as they do anyway.
        luck = RESOLVED * (was.standard_error or 0.0)
        limit = metric_limit(was.mixed, tolerance, lower_is_better=lower)
        limit += luck if lower else -luck
        if not metric_holds(metric.mixed, limit, lower_is_better=lower):
            reason = f"worse than {limit:.4g}, the limit; FP32 went from {was.fp32:.4g} to "
            reason += f"{metric.fp32:.4g}"
            yield Regression(RegressionKind.METRIC, name, "", was.mixed, metric.mixed, reason)


def looser(now: Baseline, before: Baseline) -> Iterator[Regression]:
    """What this run was held to, where that is less than the baseline was held to."""
    is_, was = now.judged, before.judged
    if is_ is None or was is None:
        if was is not None:
            reason = "the report does not say by which tolerances it was judged"
            yield Regression(RegressionKind.LOOSER, "tolerances", "", None, None, reason)
        return
    for name, limit in sorted(was.limits.items()):
        have = is_.limits.get(name)
        if have is None or (have < limit if name in _AT_LEAST else have > limit):
            reason = "this tolerance is looser than the baseline's"
            yield Regression(RegressionKind.LOOSER, name, "", limit, have, reason)
    for name in ("batches", "samples", "steps", "seeds"):
        mine, theirs = getattr(is_, name), getattr(was, name)
        if mine < theirs:
            reason = f"fewer {name} than in the baseline"
            yield Regression(RegressionKind.LOOSER, name, "", float(theirs), float(mine), reason)
    if was.margin is not None and is_.margin is not None and is_.margin > was.margin:
        reason = "the margin of the test over seeds is larger than in the baseline"
        yield Regression(RegressionKind.LOOSER, "margin", "", was.margin, is_.margin, reason)


def less_work(now: Baseline, before: Baseline) -> Iterator[Regression]:
    """Multiply-adds that are no longer in low precision, wherever they are now."""
    mine, theirs = now.share_macs_low, before.share_macs_low
    if mine is not None and theirs is not None and mine < theirs - LESS_WORK:
        reason = f"{theirs - mine:.2%} of the multiply-adds less in low precision"
        yield Regression(RegressionKind.WORK, "multiply-adds", "", theirs, mine, reason)


def added_casts(now: Baseline, before: Baseline) -> Iterator[Regression]:
    if now.casts > before.casts:
        reason = f"{now.casts - before.casts} cast(s) more than in the baseline"
        yield Regression(RegressionKind.CASTS, "eval graph", "", before.casts, now.casts, reason)


def newly_fp32(
    decisions: dict[str, NodeRecord], now: Baseline, before: Baseline
) -> Iterator[Regression]:
    for node, was in sorted(before.nodes.items()):
        if was.low and node in now.nodes and not now.nodes[node].low:
            yield _in_fp32(node, was.dtype, decisions[node])


def _in_fp32(subject: str, before: str, decision: NodeRecord) -> Regression:
    measured = f", measured: {decision.evidence}" if decision.evidence else ""
    reason = f"{decision.rule}: {decision.reason} ({decision.source}{measured})"
    kind, after = RegressionKind.NEWLY_FP32, decision.dtype
    return Regression(kind, subject, decision.layer, before, after, reason)


def replaced(
    report: RunReport, decisions: dict[str, NodeRecord], now: Baseline, before: Baseline
) -> Iterator[Regression]:
    """Low nodes that are gone, with FP32 ones in their layer instead.

    Node by node they are merely gone and new, so a layer that can no longer be captured, or an op
    that a new torch calls by another name, would slip through. In a layer that is still partly low,
    only a new node with multiply-adds counts: the rest may be an edit of the model.
    """
    by_layer: dict[str, dict[str, NodeRecord]] = {}
    for name, decision in decisions.items():
        if name in now.nodes:
            by_layer.setdefault(decision.layer, {})[name] = decision
    gone = {
        node.layer: node.dtype
        for name, node in sorted(before.nodes.items())
        if node.low and name not in now.nodes
    }
    for layer, dtype in gone.items():
        eager = [part for part in report.plan.uncaptured if _covers(part.layer, layer)]
        here = by_layer.get(layer, {})
        new = [d for name, d in here.items() if not d.low and name not in before.nodes]
        if eager and not here:
            reason = f"no longer captured, stays eager FP32: {eager[0].reason}"
            yield Regression(RegressionKind.NEWLY_FP32, layer, layer, dtype, "float32", reason)
        elif new:
            heaviest = max(new, key=lambda decision: decision.macs)
            if heaviest.macs > 0 or not any(decision.low for decision in here.values()):
                yield _in_fp32(heaviest.node, dtype, heaviest)


def _covers(outer: str, layer: str) -> bool:
    return outer == layer or layer.startswith(f"{outer}.")


def worse_errors(now: Baseline, before: Baseline, factor: float) -> Iterator[Regression]:
    floor = rounding_unit(now.dtype)
    for name, was in sorted(before.nodes.items()):
        node = now.nodes.get(name)
        if node is None:
            continue
        pairs = (
            ("local", was.local_rel_l2, node.local_rel_l2),
            ("accumulated", was.accumulated_rel_l2, node.accumulated_rel_l2),
        )
        for which, old, new in pairs:
            if new is None:
                # What a node in FP32 no longer has is said by the finding that it is in FP32.
                if old is not None and node.low >= was.low:
                    reason = f"its {which} error is no longer measured"
                    yield Regression(RegressionKind.UNMEASURED, name, node.layer, old, new, reason)
            elif growth := _growth(old, new, factor, floor):
                reason = f"its {which} error {growth}"
                yield Regression(RegressionKind.ERROR, name, node.layer, old, new, reason)


def _growth(old: float | None, new: float, factor: float, floor: float) -> str:
    """How an error is worse than it was; empty when it is not."""
    if math.isnan(new):
        return "is NaN"
    if old is None or math.isnan(old) or max(new, floor) <= factor * max(old, floor):
        return ""
    return f"grew {max(new, floor) / max(old, floor):.3g} times, limit {factor:g}"
