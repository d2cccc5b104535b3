"""Where the error of the outputs comes from, as a table of layers and a sentence on whether to
believe it."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.attribute.results import Budget, Doubt
from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport

LEAD = (
    "What each layer's own rounding adds to the error of the outputs, from random backward passes "
    "through the FP32 model; in FP32: what the layer owes even without conversion."
)
DOUBTS = {
    Doubt.ADDITIVITY: (
        "the two are more than a factor of two apart, so first order does not hold here"
    ),
    Doubt.CHOICES: "rounding changes what a ranking node chooses, which no gradient shows",
    Doubt.NONFINITE: "values overflow, so what is behind them cannot be told",
    Doubt.NO_GRADIENT: "no gradient reaches an output",
}
"""What each doubt means."""
_TRIED = "the first nodes were tried one at a time"


@dataclass(frozen=True)
class AttributionRow:
    """One layer, or where nodes were tried one node of it, and its part of the error. `tried` is
    what was measured with this node alone, None for one that was not tried."""

    layer: str
    node: str
    op: str
    rel_l2: float
    share: float
    floor: float | None
    tried: float | None = None


@dataclass(frozen=True)
class AttributionSummary:
    """What is shown: the sentence, and the rows, the largest first."""

    text: str
    rows: tuple[AttributionRow, ...]
    tried: bool


def attribution_summary(report: RunReport, most: int = 10) -> AttributionSummary | None:
    """The section; None where the error was not attributed, or is none."""
    budget = report.attribution
    if not isinstance(budget, Budget) or not any(node.rel_l2 for node in budget.nodes):
        return None
    tried = any(node.trial_rel_l2 is not None for node in budget.nodes)
    rows = _nodes(budget) if tried else _layers(budget)
    return AttributionSummary(_sentence(budget), tuple(rows[:most]), tried)


def _layers(budget: Budget) -> list[AttributionRow]:
    return [
        AttributionRow(row.layer, row.node, row.op, row.rel_l2, row.share, row.floor_rel_l2)
        for row in budget.layers()
        if row.rel_l2
    ]


def _nodes(budget: Budget) -> list[AttributionRow]:
    return [
        AttributionRow(
            row.layer, row.node, row.op, row.rel_l2, row.share, row.floor_rel_l2, row.trial_rel_l2
        )
        for row in budget.nodes
        if row.rel_l2 or row.trial_rel_l2
    ]


def _sentence(budget: Budget) -> str:
    doubts = [DOUBTS[doubt] for doubt in budget.doubts]
    found = f"measured {fmt.error(budget.measured_rel_l2)} on one batch of "
    found += fmt.count(budget.samples, "sample")
    if Doubt.NO_GRADIENT not in budget.doubts:
        found = f"predicted {fmt.error(budget.predicted_rel_l2)}, {found}"
    return "; ".join([found, *doubts, *([_TRIED] if doubts else [])])
