"""`amp-convert fp32-seeds model.py`: the spread of FP32 training over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from amp_convert.cli import flags
from amp_convert.cli.app import app
from amp_convert.cli.console import running, say_renamed
from amp_convert.loading.read_settings import load_settings
from amp_convert.validate.training.margin import MIN_SPREAD_SEEDS, require_spread

_SETTINGS = ("steps", "batches", "train_metric", "accumulate", "clip_norm", "device")

Out = Annotated[str, typer.Option("--out", metavar="FILE", help="The file to write.")]
Seeds = Annotated[int, typer.Option("--seeds", metavar="N", help="Seeds to train, at least 8.")]


@app.command("fp32-seeds", short_help="Measure FP32's spread over seeds: the margin for --seeds.")
@flags.taking(*_SETTINGS)
def fp32_seeds(
    source: flags.Source,
    given: Mapping[str, object],
    out: Out,
    seeds: Seeds = MIN_SPREAD_SEEDS,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Train MODEL in FP32 over several seeds, and keep its metric: --fp32-seeds takes the margin
    from the file."""
    settings = load_settings(source, {**given, "seeds": seeds})
    require_spread(seeds)
    with running(debug) as (console, progress):
        from amp_convert import pipeline
        from amp_convert.validate.training.seed_spread import check_writable

        check_writable(Path(out))
        made = pipeline.fp32_seeds(source, settings, progress)
        made.write(Path(out))
    if as_json:
        console.file.write(made.text)
    else:
        console.print(Text(f"{out} written: {made.summary}"), soft_wrap=True)
    return 0


@app.command("baseline", hidden=True)
@flags.taking(*_SETTINGS)
def baseline(
    source: flags.Source,
    given: Mapping[str, object],
    out: Out,
    seeds: Seeds = MIN_SPREAD_SEEDS,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """The former name of fp32-seeds."""
    say_renamed("amp-convert baseline", "amp-convert fp32-seeds")
    command: Any = fp32_seeds
    return int(command(source=source, out=out, seeds=seeds, as_json=as_json, debug=debug, **given))
