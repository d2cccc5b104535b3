"""`amp-convert gate report.json`: hold a report against a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="The report.json to judge.")],
    baseline: Annotated[
        Path, typer.Option("--baseline", metavar="FILE", help="What to hold it against.")
    ],
    factor: Annotated[
        float,
        typer.Option("--factor", metavar="X", help="How many times worse a layer's error may get."),
    ] = 2.0,
    metric_tolerance: Annotated[
        float,
        typer.Option("--metric-tolerance", metavar="X", help="Loss allowed in a metric, relative."),
    ] = 0.01,
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline anew from REPORT instead.")
    ] = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Hold a report against a baseline; for merge checks."""
    with running(debug) as (console, _):
        from amp_convert.gate import baseline as baselines
        from amp_convert.gate import compare as gating
        from amp_convert.gate.terminal import render

        current = baselines.load_report(report)
        if update:
            written = baselines.write_baseline(current, baseline)
            done = Text(f"{baseline} written: {len(written.nodes)} nodes")
            console.print(done, soft_wrap=True)
            return 0
        expected = baselines.load_baseline(baseline)
        result = gating.compare(current, expected, factor=factor, metric_tolerance=metric_tolerance)
    if as_json:
        console.file.write(result.to_json())
    else:
        render(console, result)
    return result.exit_code
