"""The audit in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp_convert.plan.plan import DecisionKind
from amp_convert.report import text as fmt
from amp_convert.report.sections.audit import AuditLayers, AuditReport, totals_text
from amp_convert.report.sections.gaps import coverage_gaps
from amp_convert.report.sections.grouping import (
    layers_text,
    ops_text,
)
from amp_convert.report.sections.islands import TWICE, IslandRow, island_rows, twice_text
from amp_convert.report.writers.terminal import (
    gap_section,
    heading,
    indented,
    place,
    short,
)

_MAX_ROWS = 60
_MARGIN = 21
"""Columns beside the last one of the table."""
_RAGGED, _LEAST = 8, 16
"""Columns that a line loses where its last word does not fit, and what is left of any reason."""

_MAX_ISLANDS = 5

_PROSE = 300


def render_audit(console: Console, report: AuditReport, folder: Path | None = None) -> None:
    """Print the audit; `folder` is where it was written, None when it was not."""
    where = f"{report.dtype} on {report.device}, rules {', '.join(report.rules)}"
    console.print(heading(f"Audit of {short(report.model.name)}", short(where, 80)))
    console.print(Text(totals_text(report)))
    console.print()
    rows = report.rows
    if rows:
        console.print(indented(_rows_table(rows[:_MAX_ROWS], min(console.width, 120) - _MARGIN)))
        rest = len(rows) - _MAX_ROWS
        if rest > 0:
            console.print(Text(f"  ... and {fmt.count(rest, 'more row')}; --out writes them all"))
        console.print()
    if costs := island_rows(report.islands, most=_MAX_ISLANDS):
        console.print(Text("What FP32 costs a call: casts at the borders of its regions"))
        console.print(indented(_islands_table(costs)))
        console.print()
    if report.stored_twice:
        console.print(Text(TWICE))
        for weight in report.stored_twice[:_MAX_ISLANDS]:
            console.print(indented(Text(short(twice_text(weight), _PROSE))))
        console.print()
    if gaps := coverage_gaps(report.unknown_ops, report.uncaptured, report.unmatched_rules):
        console.print(gap_section("Not covered", gaps))
        console.print()
    if folder is not None:
        console.print(Text(f"Audit: {folder}/audit.md"), soft_wrap=True)


def _rows_table(rows: Sequence[AuditLayers], width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("nodes", justify="right", no_wrap=True)
    table.add_column("mul-adds", justify="right", no_wrap=True)
    table.add_column("layer, what, why", overflow="fold")
    for row in rows:
        table.add_row(f"{row.nodes:,}", fmt.percent(row.macs_share), _row_text(row, width))
    return table


def _row_text(row: AuditLayers, width: int) -> Text:
    """The layers; two lines a cause at most: its reason, as far as it fits, the line of its rule
    and, where a guard decided, what it measured; and what follows those in the same layer."""
    name = fmt.tail(row.layer, width)
    where = place(row.location)
    fits = cell_len(name) + cell_len(where) <= width
    lines = [Text.assemble((name, "bold"), (where if fits else "", "dim"))]
    behind: Counter[str] = Counter()
    for cause in row.causes:
        if cause.kind is DecisionKind.PROPAGATION and cause.here:
            behind.update(dict(cause.ops))
            continue
        rule = f" [{short(cause.source)}]" if ":" in cause.source else ""
        ops = ops_text(cause.ops, limit=2)
        room = max(2 * (width - _RAGGED) - cell_len(ops) - cell_len(rule), _LEAST)
        lines.append(Text.assemble(f"{ops}: {short(cause.reason, room)}", (rule, "dim")))
        if cause.evidence:
            lines.append(Text(f"measured: {short(cause.evidence, width - 10)}"))
    if behind:
        lines.append(Text(f"{ops_text(behind.most_common())}: what follows these"))
    return Text("\n").join(lines)


def _islands_table(rows: Sequence[IslandRow]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("casts", "cast", "wider"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("kept by", overflow="fold")
    for row in rows:
        layers = layers_text(row.layers)
        sizes = (fmt.size(row.cast_bytes), fmt.size(row.wider_bytes))
        kept = f"{layers}: {short(row.keeper)}, with {ops_text(row.ops)}"
        table.add_row(f"{row.casts:,}", *sizes, Text(kept))
    return table
