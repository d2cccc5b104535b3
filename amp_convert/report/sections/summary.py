"""What a reader wants first, drawn from a `RunReport` once so that every writer says the same.

Worst layers: each layer is represented by its node of largest accumulated error, NaN counting as
the largest and ties going to the node that runs first.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from amp_convert.core.slices import SliceError, SliceKind
from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.validate.inference.results import Divergence, NodeDivergence, OutputError
from amp_convert.verdict.check import CheckStatus
from amp_convert.verdict.performance_check import is_slower
from amp_convert.verdict.verdict import VerdictStatus

ARMS = ("fp32", "autocast", "mixed", "frozen", "folded")


@dataclass(frozen=True)
class Comparison:
    """One quantity, one formatted value an arm; an empty value does not apply."""

    quantity: str
    fp32: str = ""
    autocast: str = ""
    mixed: str = ""
    frozen: str = ""
    folded: str = ""


@dataclass(frozen=True)
class WorstLayer:
    """A layer and the error of its worst node. Errors are relative L2, None where not measured."""

    layer: str
    node: str
    op: str
    dtype: str
    location: str
    local: float | None
    accumulated: float


def severity(value: float | None) -> float:
    """Sort key of an error: NaN is worse than infinity, not measured is below everything."""
    if value is None:
        return -1.0
    if math.isnan(value):
        return math.inf
    return min(value, sys.float_info.max)


def worst_output(outputs: Sequence[OutputError]) -> OutputError | None:
    """The floating point output of largest relative error; None when there is none."""
    floating = [output for output in outputs if "float" in output.dtype]
    return max(floating, key=lambda output: severity(output.rel_l2), default=None)


def comparison(report: RunReport) -> list[Comparison]:
    """Headline figures, one row a quantity: output error, metrics, time, peak memory."""
    inference = report.inference
    if inference is None:
        return []
    return [*_error_rows(inference), *_metric_rows(inference), *_cost_rows(inference)]


def _error_rows(inference: Divergence) -> list[Comparison]:
    mixed = worst_output(inference.outputs)
    if mixed is None:
        return []
    autocast = worst_output(inference.autocast_outputs)
    frozen = worst_output(inference.frozen_outputs)
    folded = worst_output(inference.folded_outputs)
    floating = sum("float" in output.dtype for output in inference.outputs)
    return [
        Comparison(
            f"output error, worst of {floating}" if floating > 1 else "output error",
            fp32=fmt.error(mixed.noise_rel_l2) if mixed.noise_rel_l2 is not None else "0",
            autocast=fmt.error(autocast.rel_l2) if autocast else "",
            mixed=fmt.error(mixed.rel_l2),
            frozen=fmt.error(frozen.rel_l2) if frozen else "",
            folded=fmt.error(folded.rel_l2) if folded else "",
        ),
        *_slice_rows(inference),
    ]


def _slice_rows(inference: Divergence) -> list[Comparison]:
    """The worst channel and the worst sample of each arm, relative to their own spread, with FP32's
    own noise."""
    arms = {
        "autocast": inference.autocast_outputs,
        "mixed": inference.outputs,
        "frozen": inference.frozen_outputs,
        "folded": inference.folded_outputs,
    }
    rows = []
    for kind in (SliceKind.CHANNEL, SliceKind.SAMPLE):
        worst = {arm: worst_slice(outputs, kind) for arm, outputs in arms.items()}
        mixed = worst["mixed"]
        if mixed is None:
            continue
        shown = {arm: fmt.error(found.error) for arm, found in worst.items() if found}
        rows.append(Comparison(f"worst {kind.value}", fp32=fmt.error(mixed.noise), **shown))
    return rows


def worst_slice(outputs: Sequence[OutputError], kind: SliceKind) -> SliceError | None:
    """The slice of a kind of largest error; None when there is none."""
    found = [each for output in outputs for each in output.slices if each.kind is kind]
    return max(found, key=lambda each: severity(each.error), default=None)


def _metric_rows(inference: Divergence) -> list[Comparison]:
    folded = {metric.name: fmt.number(metric.mixed) for metric in inference.folded_metrics}
    return [
        Comparison(
            fmt.printable(metric.name) + (" (lower is better)" if metric.lower_is_better else ""),
            fp32=fmt.number(metric.fp32),
            autocast=fmt.number(metric.autocast),
            mixed=fmt.number(metric.mixed),
            folded=folded.get(metric.name, ""),
        )
        for metric in inference.metrics
    ]


def _cost_rows(inference: Divergence) -> list[Comparison]:
    times = {cost.arm: fmt.milliseconds(cost.milliseconds) for cost in inference.costs}
    peaks = {cost.arm: fmt.mebibytes(cost.peak_bytes) for cost in inference.costs}
    rows = (("time per forward", times), ("peak memory", peaks))
    return [
        Comparison(name, *(values.get(arm, "") for arm in ARMS))
        for name, values in rows
        if any(values.values())
    ]


def worst_layers(report: RunReport, limit: int = 10) -> list[WorstLayer]:
    """The `limit` layers of largest accumulated error, worst first."""
    locations = {decision.node: decision.location for decision in report.plan.decisions}
    worst: dict[str, NodeDivergence] = {}
    for row in report.inference.nodes if report.inference else ():
        if row.accumulated_rel_l2 is None:
            continue
        held = worst.get(row.layer)
        if held is None or severity(row.accumulated_rel_l2) > severity(held.accumulated_rel_l2):
            worst[row.layer] = row
    ranked = sorted(worst.values(), key=lambda row: -severity(row.accumulated_rel_l2))
    return [
        WorstLayer(
            row.layer,
            row.node,
            row.op,
            row.dtype,
            locations.get(row.node, ""),
            row.local_rel_l2,
            row.accumulated_rel_l2,
        )
        for row in ranked[:limit]
        if row.accumulated_rel_l2 is not None and row.accumulated_rel_l2 != 0
    ]


def verdict_sentence(report: RunReport) -> str:
    """The line under the verdict: where it is inconclusive, what decided that and what to do; then
    how many checks passed, and how many failed."""
    checks = report.verdict.checks
    counts = Counter(check.status for check in checks)
    decided = ""
    if report.verdict.status == VerdictStatus.INCONCLUSIVE:
        first = next(c for c in checks if c.required and c.status == CheckStatus.UNCHECKED)
        decided = f"undecided by {first.name}: {first.reason}; "
    slower = is_slower(report.inference, checks)
    if slower is not None and slower.name not in decided:
        decided += f"{slower.reason}; "
    parts = [f"{counts[CheckStatus.PASS]} of {fmt.count(len(checks), 'check')} passed"]
    if counts[CheckStatus.FAIL]:
        parts.append(f"{counts[CheckStatus.FAIL]} failed")
    if counts[CheckStatus.UNCHECKED]:
        parts.append(f"{counts[CheckStatus.UNCHECKED]} not checked")
    return decided + ", ".join(parts)


def precision_text(report: RunReport) -> str:
    """ "41 of 55 nodes (74.5 %), 99.1 % of the multiply-adds"."""
    plan = report.plan
    nodes = f"{plan.low_nodes:,} of {fmt.count(plan.nodes, 'node')}"
    share = fmt.percent(plan.share_nodes_low)
    return f"{nodes} ({share}), {fmt.percent(plan.share_macs_low)} of the multiply-adds"


def casts_text(report: RunReport) -> str:
    """ "3 inserted, at 4 borders between precisions"."""
    borders = fmt.count(report.plan.borders, "border")
    return f"{report.plan.casts:,} inserted, at {borders} between precisions"


def tolerance(report: RunReport) -> float | None:
    """What the relative L2 error of an output was held to; None where it was not held to any."""
    for check in report.verdict.checks:
        if check.name == "outputs.rel_l2" and isinstance(check.threshold, float):
            return check.threshold
    return None
