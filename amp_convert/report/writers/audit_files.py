"""The audit as files: audit.json, audit.csv and audit.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from amp_convert.report.folder import write_folder
from amp_convert.report.sections.audit import AuditReport, AuditRow, totals_text
from amp_convert.report.sections.gaps import coverage_gaps
from amp_convert.report.sections.grouping import (
    ops_text,
)
from amp_convert.report.writers.csv_report import csv_text
from amp_convert.report.writers.islands_markdown import islands_lines
from amp_convert.report.writers.json_report import json_text
from amp_convert.report.writers.markdown import code, escape, table


def audit_csv(details: Iterable[AuditRow]) -> str:
    """The text of audit.csv: one row an `AuditRow`, one column a field."""
    rows = ([_csv_value(value) for value in astuple(row)] for row in details)
    return csv_text([field.name for field in fields(AuditRow)], rows)


def _csv_value(value: str | float | tuple[tuple[str, int], ...]) -> str | float:
    return ops_text(value, limit=len(value)) if isinstance(value, tuple) else value


def audit_markdown(report: AuditReport) -> str:
    """The text of audit.md."""
    rows = [
        [
            code(row.layer),
            f"{sum(count for _, count in cause.ops):,}",
            escape(ops_text(cause.ops)),
            escape(cause.reason),
            escape(cause.evidence),
            f"{code(cause.rule)} {code(cause.source)}" if cause.source else code(cause.rule),
            code(row.location),
        ]
        for row in report.rows
        for cause in row.causes
    ]
    columns = ["layer", "nodes", "ops", "reason", "evidence", "rule", "place"]
    gaps = coverage_gaps(report.unknown_ops, report.uncaptured, report.unmatched_rules)
    lines = [f"# Audit: {escape(report.model.name)} in {report.dtype} on {report.device}"]
    lines += ["", f"{totals_text(report)}. Rules: {', '.join(map(code, report.rules))}."]
    lines += ["", *table(columns, rows, numbers="1")] if rows else []
    if shown := islands_lines(report.islands, report.stored_twice):
        lines += ["", *shown]
    if gaps:
        lines += ["", "## Not covered", ""]
        lines += [f"- {escape(gap.what)}: {escape(gap.reason)}" for gap in gaps]
    return "\n".join(lines) + "\n"


def audit_json(report: AuditReport) -> str:
    """The text of audit.json: strict JSON with a row a line, so that a large model's fits on a
    screen."""
    document = json.loads(json_text(report))
    lines = [
        f"  {json.dumps(key)}: {_lines(value) if key == 'rows' else json.dumps(value)}"
        for key, value in document.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(rows: list[Any]) -> str:
    inside = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f"[\n{inside}\n  ]" if rows else "[]"


def write_audit(out: Path, report: AuditReport, details: Iterable[AuditRow]) -> None:
    """Write audit.json, audit.csv with the `details`, and audit.md. Raises UsageError as
    `write_folder`."""
    files = {
        "audit.json": audit_json(report),
        "audit.csv": audit_csv(details),
        "audit.md": audit_markdown(report),
    }
    write_folder(out, files)
