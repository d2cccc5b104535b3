"""What FP32 costs, in report.md and audit.md: islands, and weights that are held twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from amp_convert.plan.costs import Island, StoredTwice
from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import layers_text, ops_text
from amp_convert.report.sections.islands import LEAD, TWICE, island_rows, twice_text
from amp_convert.report.writers.markdown import escape, table


def islands_lines(islands: Iterable[Island], twice: Sequence[StoredTwice] = ()) -> list[str]:
    """The section, or no line where FP32 costs nothing."""
    rows = [
        [
            f"{row.islands:,}",
            f"{row.casts:,}",
            fmt.size(row.cast_bytes),
            fmt.size(row.wider_bytes),
            escape(layers_text(row.layers)),
            escape(ops_text(row.ops)),
            escape(f"{row.keeper}: {row.reason}"),
            escape(row.evidence),
        ]
        for row in island_rows(islands)
    ]
    header = ["islands", "casts", "cast", "wider results", "kept by", "ops", "reason", "evidence"]
    lines = [LEAD, "", *table(header, rows, numbers="0123"), ""] if rows else []
    if twice:
        lines += [TWICE, "", *(f"- {escape(twice_text(weight))}" for weight in twice), ""]
    return ["## What FP32 costs", "", *lines[:-1]] if lines else []
