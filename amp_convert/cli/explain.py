"""`amp-convert explain model.py --layer NAME`: one layer, or one node, on one page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running
from amp_convert.core.errors import UsageError
from amp_convert.loading.read_settings import load_settings


@app.command()
@flags.taking("dtype", "rules", "device", "calibrate", "cache")
def explain(
    source: flags.Source,
    given: Mapping[str, object],
    layer: Annotated[
        str | None,
        typer.Option("--layer", metavar="NAME", help="A layer's path; '' is the top level."),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="ID", help="A node's identity, as in layers.csv."),
    ] = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Show everything about one layer or node of MODEL: decision, causes, error, price."""
    if (layer is None) == (node is None):
        raise UsageError("explain is of one layer or node", mend="Give --layer NAME or --node ID.")
    settings = load_settings(source, given)
    with running(debug) as (console, progress):
        from amp_convert import planning
        from amp_convert.report.writers.explain_terminal import (
            explanation_json,
            render_explanation,
        )

        found = planning.explain(source, settings, progress, layer=layer, node=node)
    if as_json:
        console.file.write(explanation_json(found))
    else:
        render_explanation(console, found)
    return 0
