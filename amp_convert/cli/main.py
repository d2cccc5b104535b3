"""The command line: arguments -> pipeline -> exit code, and nothing else.

`amp-convert model.py` is short for `amp-convert convert model.py`. Progress and messages go to
stderr, the result to stdout; what the user's own code prints goes to stderr too. An error that
amp-convert foresaw is one line; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.exceptions import TyperException

from amp_convert import __version__
from amp_convert.cli import flags
from amp_convert.cli.console import reserve_stdout, running
from amp_convert.core.errors import AmpConvertError, UsageError, first_line
from amp_convert.loading.settings import SETTINGS, load_settings
from amp_convert.validate.training.noninferiority import MIN_BASELINE_SEEDS, require_baseline

if TYPE_CHECKING:
    from amp_convert.gate.compare import GateResult
    from amp_convert.report import RunReport

# One paragraph a line: the help is wrapped to the terminal.
_HELP = """\
Convert a PyTorch model to mixed precision and prove that the result is as good as FP32.

`amp-convert model.py` is short for `amp-convert convert model.py`.

All flags of it: `amp-convert convert --help`
"""
_EPILOG = """\
Exit codes: 0 pass, 1 parity or gate failed, 2 wrong usage or input, 3 inconclusive, 4 model not \
supported. The model file is your own code and is executed.
"""

app = typer.Typer(
    name="amp-convert",
    help=_HELP,
    epilog=_EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup would swallow "[default: 4]"
)


@app.command(short_help="Convert MODEL, compare it with FP32, and give a verdict.")
def convert(
    source: flags.Source,
    dtype: flags.Dtype = None,
    rules: flags.Rules = None,
    device: flags.Device = None,
    out: flags.Out = None,
    calibrate: flags.Calibrate = None,
    batches: flags.Batches = None,
    tolerance: flags.Tolerance = None,
    metric_tolerance: flags.MetricTolerance = None,
    baseline: flags.Baseline = None,
    onnx: flags.Onnx = None,
    io_types: flags.IoTypes = None,
    opset: flags.Opset = None,
    external_data: flags.ExternalData = None,
    train: flags.Train = None,
    steps: flags.Steps = None,
    seeds: flags.Seeds = None,
    margin: flags.Margin = None,
    fp32_baseline: flags.Fp32Baseline = None,
    train_metric: flags.TrainMetric = None,
    accumulate: flags.Accumulate = None,
    clip_norm: flags.ClipNorm = None,
    loss_scale: flags.LossScale = None,
    initial_scale: flags.InitialScale = None,
    scale_growth: flags.ScaleGrowth = None,
    scale_backoff: flags.ScaleBackoff = None,
    scale_interval: flags.ScaleInterval = None,
    checkpoint: flags.Checkpoint = None,
    checkpoint_every: flags.CheckpointEvery = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Convert MODEL, compare it with its FP32 original node by node, and give a verdict."""
    settings = flags.convert_settings(source, _given(locals()))
    with running(debug) as (console, progress):
        from amp_convert import pipeline
        from amp_convert.gate.baseline import load_baseline
        from amp_convert.report.files import write_report
        from amp_convert.report.folder import check_writable, workspace

        folder = pipeline.output_folder(source, settings)
        check_writable(folder)
        expected = load_baseline(Path(settings.baseline)) if settings.baseline else None
        gated = None
        with workspace(folder) as work:
            run = pipeline.convert(source, settings, progress, work)
            if expected is not None:
                from amp_convert.gate import compare as gate

                tolerance = settings.metric_tolerance
                gated = gate.compare(run.report, expected, metric_tolerance=tolerance)
            write_report(folder, run.report, run.plan.to_toml(), run.files)
        pipeline.clean_up(run, settings)
    _print_report(console, run.report, folder, gated, as_json=as_json)
    return run.report.verdict.exit_code or (gated.exit_code if gated else 0)


@app.command(short_help="Measure FP32's spread over seeds: the margin for --seeds.")
def baseline(
    source: flags.Source,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="The file to write.")],
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="Seeds to train, at least 8.")
    ] = MIN_BASELINE_SEEDS,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Training steps. [default: 50]")
    ] = None,
    batches: flags.Batches = None,
    train_metric: flags.TrainMetric = None,
    accumulate: flags.Accumulate = None,
    clip_norm: flags.ClipNorm = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Train MODEL in FP32 over several seeds, and keep its metric: --fp32-baseline takes the
    margin from the file."""
    settings = load_settings(source, _given(locals()))
    require_baseline(seeds)
    with running(debug) as (console, progress):
        from amp_convert import pipeline
        from amp_convert.validate.training.seed_spread import check_writable

        check_writable(Path(out))
        made = pipeline.baseline(source, settings, progress)
        made.write(Path(out))
    if as_json:
        console.file.write(made.text)
    else:
        console.print(Text(f"{out} written: {made.summary}"), soft_wrap=True)
    return 0


@app.command()
def audit(
    source: flags.Source,
    dtype: flags.Dtype = None,
    rules: flags.Rules = None,
    device: flags.Device = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="A folder to write the audit to.")
    ] = None,
    calibrate: flags.Calibrate = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> int:
    """Show which layers of MODEL stay FP32, and why; convert nothing."""
    given = {"dtype": dtype, "rules": rules, "device": device, "calibrate": calibrate}
    settings = load_settings(source, given)
    with running(debug) as (console, progress):
        from amp_convert import pipeline
        from amp_convert.report.folder import check_writable
        from amp_convert.report.sections import audit as auditing
        from amp_convert.report.writers.json_report import json_text

        folder = Path(out) if out else None
        if folder is not None:
            check_writable(folder)
        plan, model = pipeline.audit(source, settings, progress)
        report = auditing.audit_report(plan, model, __version__)
        if folder is not None:
            auditing.write_audit(folder, report)
    if as_json:
        console.file.write(json_text(report))
    else:
        auditing.render_audit(console, report, folder)
    return 0


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run the command and exit with its code."""
    reserve_stdout()
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _READER_GONE
    if code == _READER_GONE:
        # Or Python would try once more at its end, and say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command for these arguments and return its exit code."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    if not arguments:
        run(["--help"])
        return UsageError.exit_code
    debug = "--debug" in arguments
    try:
        code = typer.main.get_command(app).main(
            args=_normalised(arguments), prog_name="amp-convert", standalone_mode=False
        )
    except AmpConvertError as error:
        _show(errors, str(error), debug=debug)
        return error.exit_code
    except TyperException as error:
        _show(errors, _usage_message(error), debug=False)
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except (BrokenPipeError, SystemExit):  # the latter is what typer makes of the former
        return _READER_GONE
    except Exception as error:  # noqa: BLE001  the last line of defence: no bare traceback for users
        what = f"{type(error).__name__}: {first_line(error)}"
        mend = "This is a fault in amp-convert; --debug shows where."
        _show(errors, f"{what}. {mend}", debug=debug)
        return UsageError.exit_code
    if code == _INTERRUPTED:  # typer makes this code of Ctrl-C, too
        _show(errors, "interrupted", debug=False)
    return int(code or 0)


# What a shell reports of a process that these signals end: 128 + SIGINT, 128 + SIGPIPE.
_INTERRUPTED, _READER_GONE = 130, 141
_COMMANDS = ("convert", "baseline", "audit", "gate")


def _given(parameters: Mapping[str, object]) -> dict[str, object]:
    """The settings among a command's parameters."""
    return {name: parameters[name] for name in SETTINGS if name in parameters}


def _normalised(arguments: Sequence[str]) -> list[str]:
    """The arguments with the default command filled in, and `--rules a b` as `--rules a --rules
    b`.
    """
    spelled: list[str] = []
    more_rules = False  # whether another name may follow the last one
    for argument in arguments:
        if more_rules and _names_rules(argument):
            spelled += ["--rules", argument]
        else:
            more_rules = bool(spelled) and spelled[-1] == "--rules"
            spelled.append(argument)
    if not spelled or spelled[0] in (*_COMMANDS, "--help", "--version"):
        return spelled
    _refuse_unknown_command(spelled[0])
    return ["convert", *spelled]


def _names_rules(argument: str) -> bool:
    """Whether an argument behind a rules file's name is another one, and not the model."""
    return argument.endswith(".toml") or bool(re.fullmatch(r"\w[\w-]*", argument))


def _refuse_unknown_command(word: str) -> None:
    """Raises UsageError for a first word that can be nothing but the name of a command."""
    if not re.fullmatch(r"[a-z]+", word) or os.path.exists(word):
        return
    if word == "tune":
        what = f"tune is not available in amp-convert {__version__}"
        raise UsageError(what, mend=f"Its commands are {', '.join(_COMMANDS)}.")
    near = difflib.get_close_matches(word, _COMMANDS, n=1)
    mend = f"Did you mean {near[0]}?" if near else "See amp-convert --help."
    raise UsageError(f"there is no command or file {word}", mend=mend)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"amp-convert {__version__}")


# --- output --------------------------------------------------------------------------------------


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


def _show(console: Console, message: str, *, debug: bool) -> None:
    if debug:
        console.print(Text(traceback.format_exc().rstrip(), style="dim"))
    console.print(Text.assemble(("error: ", "bold red"), message))


def _usage_message(error: TyperException) -> str:
    """Typer's own message as one line with the mend, which is the nearest flag or the help."""
    context = getattr(error, "ctx", None)
    mend = f"See {context.command_path if context else 'amp-convert'} --help."
    message = " ".join(error.format_message().split()).rstrip(".")
    flag = getattr(error, "option_name", "")
    if message.startswith("No such option"):
        message = f"there is no flag {flag}"
        if near := difflib.get_close_matches(flag, getattr(error, "possibilities", ()) or (), n=1):
            mend = f"Did you mean {near[0]}?"
    message = re.sub(r", unable to parse string as an? \w+$", "", message)
    return f"{message}. {mend}"
