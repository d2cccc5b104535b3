"""The audit in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp_convert.plan.plan import DecisionKind
from amp_convert.report import text as fmt
from amp_convert.report.sections.audit import AuditReport, AuditRow, totals_text
from amp_convert.report.sections.grouping import (
    layer_patterns,
    layers_text,
    ops_text,
    pattern_of,
)
from amp_convert.report.sections.islands import TWICE, IslandRow, island_rows, twice_text
from amp_convert.report.sections.summary import coverage_gaps
from amp_convert.report.writers.terminal import (
    gap_section,
    heading,
    indented,
    reason_text,
    rule_text,
    short,
)

_MAX_ROWS = 60

_MAX_ISLANDS = 5

_PROSE = 300


def render_audit(console: Console, report: AuditReport, folder: Path | None = None) -> None:
    """Print the audit; `folder` is where it was written, None when it was not."""
    where = f"{report.dtype} on {report.device}, rules {', '.join(report.rules)}"
    console.print(heading(f"Audit of {short(report.model.name)}", short(where, 80)))
    console.print(Text(totals_text(report)))
    console.print()
    rows = _merged(report.rows)
    if rows:
        console.print(indented(_rows_table(rows[:_MAX_ROWS])))
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


def _merged(rows: Iterable[AuditRow]) -> list[list[AuditRow]]:
    """Rows that give one reason for layers which differ only in an index, together."""
    groups: dict[tuple[str, ...], list[AuditRow]] = {}
    for row in rows:
        key = (pattern_of(row.layer), row.rule, row.reason, row.source)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _rows_table(groups: Sequence[list[AuditRow]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("nodes", justify="right", no_wrap=True)
    table.add_column("mul-adds", justify="right", no_wrap=True)
    table.add_column("layer, what, why", overflow="fold")
    for rows in groups:
        nodes = sum(row.nodes for row in rows)
        share = sum(row.macs_share for row in rows)
        table.add_row(f"{nodes:,}", fmt.percent(share), _row_text(rows))
    return table


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


def _row_text(rows: Sequence[AuditRow]) -> Text:
    row = rows[0]
    ops: Counter[str] = Counter()
    for each in rows:
        ops.update(dict(each.ops))
    evidence = dict.fromkeys(each.evidence for each in rows if each.evidence)
    shown = next(iter(evidence), "")
    if len(evidence) > 1:
        shown += f", the first of {len(evidence)}"
    return reason_text(
        layers_text(layer_patterns(each.layer for each in rows)) + "\n",
        f"{ops_text(ops.most_common())}: {short(row.reason, _PROSE)}\n",
        rule_text(row.rule, row.source),
        shown,
        row.location,
        stands_out=row.kind is DecisionKind.GUARD,
    )
