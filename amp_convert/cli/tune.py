"""`amp-convert tune model.py`: the cheapest plan within a tolerance, as a rules file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running
from amp_convert.core.errors import UsageError
from amp_convert.loading.read_settings import load_settings
from amp_convert.loading.source import output_folder
from amp_convert.tune.results import Cost, Goals


@app.command()
@flags.taking("dtype", "rules", "device", "calibrate", "cache", "tolerance")
def tune(
    source: flags.Source,
    given: Mapping[str, object],
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="With --max-drop: the metric.")
    ] = "",
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="X", help="How much worse it may be than FP32's."),
    ] = None,
    speed_at_least: Annotated[
        float | None,
        typer.Option("--speed-at-least", metavar="X", help="How many times FP32's speed."),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            "--cost",
            metavar="measured|model",
            help="Prices in milliseconds, or by multiply-adds. "
            "[default: measured where the device has fast kernels]",
        ),
    ] = None,
    group_blocks: Annotated[
        bool, typer.Option("--group-blocks", help="One choice for each numbered block.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder for tuned.toml and the frontier. "
            "[default: reports/<MODEL's stem>-tuned]",
        ),
    ] = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Find the cheapest plan for MODEL within a tolerance; write it as a rules file."""
    settings = load_settings(source, given)
    goals = _goals(settings.tolerance, metric, max_drop, speed_at_least)
    priced, folder = _cost(cost), output_folder(source, out, "-tuned")
    with running(debug) as (console, progress):
        from amp_convert import planning
        from amp_convert.report.folder import check_writable
        from amp_convert.report.writers import tune_files
        from amp_convert.report.writers.tune_terminal import render_tuned

        check_writable(folder)
        tuned = planning.tune(source, settings, goals, progress, cost=priced, blocks=group_blocks)
        tune_files.write_tuned(folder, tuned, settings.rules)
    if as_json:
        console.file.write(tune_files.tune_json(tuned))
    else:
        render_tuned(console, tuned, folder)
    return 0 if tuned.reached else 1


def _goals(
    tolerance: float | None, metric: str, max_drop: float | None, speed: float | None
) -> Goals:
    """Raises UsageError for goals that say nothing, or cannot be."""
    if bool(metric) != (max_drop is not None):
        raise UsageError("--metric and --max-drop go together", mend="Give both, or neither.")
    for name, value in (("--max-drop", max_drop), ("--speed-at-least", speed)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}", mend="Give a number of at least 0.")
    if tolerance is None and max_drop is None and speed is None:
        raise UsageError(
            "there is no goal to tune for",
            mend="Give --tolerance X, --metric NAME with --max-drop X, or --speed-at-least X.",
        )
    return Goals(tolerance=tolerance, metric=metric, max_drop=max_drop, speed=speed)


def _cost(name: str | None) -> Cost | None:
    if name is None:
        return None
    if name not in set(Cost):
        raise UsageError(f"--cost is {name}", mend=f"Give one of: {', '.join(Cost)}.")
    return Cost(name)
