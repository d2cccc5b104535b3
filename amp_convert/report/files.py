"""The report folder of a run: one writer a file, put in place all at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from amp_convert.report.folder import write_folder
from amp_convert.report.model import RunReport
from amp_convert.report.writers.csv_report import layers_csv
from amp_convert.report.writers.html_report import html_text
from amp_convert.report.writers.json_report import json_text
from amp_convert.report.writers.junit_report import junit_text
from amp_convert.report.writers.markdown_report import markdown_text


def report_files(report: RunReport, plan_toml: str) -> dict[str, str]:
    """The text of every file by name.

    `plan_toml` is `Plan.to_toml()`: it pins the nodes of the train graph too, which a report of the
    eval plan does not hold.
    """
    return {
        "report.json": json_text(report),
        "layers.csv": layers_csv(report),
        "plan.toml": plan_toml,
        "report.md": markdown_text(report),
        "report.html": html_text(report),
        "junit.xml": junit_text(report),
    }


def write_report(out: Path, report: RunReport, plan_toml: str, files: Iterable[Path] = ()) -> None:
    """Write the report folder `out`, whole or not at all, and move `files` into it. Raises
    UsageError as `write_folder`."""
    moved = {file.name: file for file in files}
    write_folder(out, {**report_files(report, plan_toml), **moved})
