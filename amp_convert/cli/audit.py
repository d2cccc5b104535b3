"""`amp-convert audit model.py`: which layers stay FP32, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from amp_convert import __version__
from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running
from amp_convert.loading.read_settings import load_settings


@app.command()
@flags.taking("dtype", "rules", "device", "calibrate", "cache")
def audit(
    source: flags.Source,
    given: Mapping[str, object],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="A folder to write the audit to.")
    ] = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Show which layers of MODEL stay FP32, and why; convert nothing."""
    settings = load_settings(source, given)
    with running(debug) as (console, progress):
        from amp_convert import planning
        from amp_convert.report.folder import check_writable
        from amp_convert.report.sections.audit import audit_report, audit_rows
        from amp_convert.report.writers import audit_files
        from amp_convert.report.writers.audit_terminal import render_audit

        folder = Path(out) if out else None
        if folder is not None:
            check_writable(folder)
        plan, model = planning.audit(source, settings, progress)
        report = audit_report(plan, model, __version__)
        if folder is not None:
            audit_files.write_audit(folder, report, audit_rows(plan))
    if as_json:
        console.file.write(audit_files.audit_json(report))
    else:
        render_audit(console, report, folder)
    return 0
