"""FP32 islands and their costs, in report.md and audit.md."""

from __future__ import annotations

from collections.abc import Iterable

from amp_convert.plan.costs import Island
from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import layers_text, ops_text
from amp_convert.report.sections.islands import LEAD, island_rows
from amp_convert.report.writers.markdown import escape, table


def islands_lines(islands: Iterable[Island]) -> list[str]:
    """The section, or no line where there is no island."""
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
    lines = ["## What FP32 costs", "", LEAD, "", *table(header, rows, numbers="0123")]
    return lines if rows else []
