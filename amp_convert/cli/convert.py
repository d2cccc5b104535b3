"""`amp-convert model.py`: convert a model and judge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running
from amp_convert.loading.settings import SETTINGS
from amp_convert.loading.source import output_folder

if TYPE_CHECKING:
    from amp_convert.gate.compare import GateResult
    from amp_convert.report import RunReport


@app.command(short_help="Convert MODEL, compare it with FP32, and give a verdict.")
@flags.taking(*SETTINGS)
def convert(
    source: flags.Source,
    given: Mapping[str, object],
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Convert MODEL, compare it with its FP32 original node by node, and give a verdict."""
    settings = flags.convert_settings(source, given)
    with running(debug) as (console, progress):
        from amp_convert import pipeline
        from amp_convert.report.files import write_report
        from amp_convert.report.folder import check_writable, workspace

        folder = output_folder(source, settings.out)
        check_writable(folder)
        with workspace(folder) as work:
            run = pipeline.convert(source, settings, progress, work)
            write_report(folder, run.report, run.plan.to_toml(), run.files)
        pipeline.clean_up(run, settings)
    _print_report(console, run.report, folder, run.gated, as_json=as_json)
    return run.exit_code


def _print_report(
    console: Console, report: RunReport, folder: Path, gated: GateResult | None, *, as_json: bool
) -> None:
    from amp_convert.gate import terminal as gate_terminal
    from amp_convert.report.writers.json_report import json_text
    from amp_convert.report.writers.terminal import render

    if as_json:
        console.file.write(json_text(report))
    else:
        render(console, report, folder)
    if gated is not None:
        gate_terminal.render(Console(stderr=True, highlight=False) if as_json else console, gated)
