"""Where the error comes from, in report.md."""

from __future__ import annotations

from amp_convert.report import text as fmt
from amp_convert.report.sections.attribution import LEAD, AttributionSummary
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.writers.markdown import code, escape, table


def attribution_lines(found: AttributionSummary | None) -> list[str]:
    """The section, or no line where there is nothing to show."""
    if found is None:
        return []
    rows = [
        [
            fmt.percent(row.share),
            fmt.error(row.rel_l2),
            fmt.error(row.floor),
            *([fmt.error(row.tried)] if found.tried else []),
            code(layer_name(row.layer)),
            code(row.op),
        ]
        for row in found.rows
    ]
    header = ["share", "adds", "in FP32", *(["tried alone"] if found.tried else []), "layer", "op"]
    lines = table(header, rows, numbers="0123" if found.tried else "012")
    sentence = found.text[0].upper() + found.text[1:]
    return ["## Where the error comes from", "", LEAD, "", f"{escape(sentence)}.", "", *lines]
