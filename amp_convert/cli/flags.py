"""The command line's flags: their names, what `--help` says of them, and which go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Annotated

import typer

from amp_convert.core.errors import UsageError
from amp_convert.loading.settings import Settings, load_settings
from amp_convert.validate.training.noninferiority import LOOKS, require_test

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="model.py, or package.module:attribute.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="float16|bfloat16", help="The low precision. [default: float16]"
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rules",
        metavar="NAME|FILE ...",
        help="Presets (default, autocast, fp32, half) or rules files; later ones win. "
        "[default: default]",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        help="Where to run; also cuda:N. auto takes CUDA where there is one. [default: auto]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the libraries' warnings, and tracebacks.")
]
Calibrate = Annotated[
    int | None,
    typer.Option("--calibrate", metavar="N", help="Batches to calibrate on. [default: 4]"),
]

# --- of convert ---

Out = Annotated[
    str | None,
    typer.Option(
        "--out", metavar="DIR", help="The report's folder. [default: reports/<MODEL's stem>]"
    ),
]
Batches = Annotated[
    int | None,
    typer.Option("--batches", metavar="N", help="Eval batches to compare on. [default: 8]"),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        help="Largest relative L2 error of an output. [default: 0.02, for bfloat16 0.16]",
    ),
]
MetricTolerance = Annotated[
    float | None,
    typer.Option(
        "--metric-tolerance",
        metavar="X",
        help="Loss allowed in a metric, relative. [default: 0.01]",
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="FILE", help="Gate the result on this baseline too."),
]
Onnx = Annotated[
    bool | None,
    typer.Option("--onnx", help="Write the model as ONNX too, and check it in ONNX Runtime."),
]
IoTypes = Annotated[
    str | None,
    typer.Option(
        "--io-types",
        metavar="keep|low",
        help="ONNX inputs and outputs in FP32, or in the low dtype. [default: keep]",
    ),
]
Opset = Annotated[
    int | None,
    typer.Option("--opset", metavar="N", help="ONNX opset. [default: the first that suffices]"),
]
ExternalData = Annotated[
    bool | None,
    typer.Option("--external-data", help="ONNX weights in a file of their own."),
]

# --- of training ---

Train = Annotated[
    bool | None,
    typer.Option(
        "--train/--no-train",
        help="Train beside FP32, too. [default: where MODEL defines train_batches and loss]",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Training steps. [default: up to 50]"),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        help="Train up to N pairs, 5 to 12, and test that mixed is not worse. [default: 1]",
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        "--margin", metavar="X", help="With --seeds: how much worse the metric may be, in its unit."
    ),
]
Fp32Baseline = Annotated[
    str | None,
    typer.Option(
        "--fp32-baseline",
        metavar="FILE",
        help="With --seeds: take the margin from this file of amp-convert baseline.",
    ),
]
TrainMetric = Annotated[
    str | None,
    typer.Option(
        "--train-metric",
        metavar="NAME",
        help="The metric that training is judged by. [default: the first]",
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option("--accumulate", metavar="N", help="Batches to a training step. [default: 1]"),
]
ClipNorm = Annotated[
    float | None,
    typer.Option("--clip-norm", metavar="X", help="Clip gradients to this L2 norm."),
]
LossScale = Annotated[
    str | None,
    typer.Option(
        "--loss-scale",
        metavar="dynamic|none|X",
        help="How the loss is scaled. [default: dynamic, for bfloat16 none]",
    ),
]
InitialScale = Annotated[
    float | None,
    typer.Option(
        "--initial-scale", metavar="X", help="Where a dynamic loss scale starts. [default: 65536]"
    ),
]
ScaleGrowth = Annotated[
    float | None,
    typer.Option("--scale-growth", metavar="X", help="Its growth factor. [default: 2]"),
]
ScaleBackoff = Annotated[
    float | None,
    typer.Option("--scale-backoff", metavar="X", help="Its back-off factor. [default: 0.5]"),
]
ScaleInterval = Annotated[
    int | None,
    typer.Option(
        "--scale-interval", metavar="N", help="Clean steps before it grows. [default: 2000]"
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="DIR", help="Keep the training's state here, and go on from it."
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option("--checkpoint-every", metavar="N", help="Steps between. [default: 25]"),
]

# --- which go together ---

_OF_A_SCALE = ("initial_scale", "scale_growth", "scale_backoff", "scale_interval")
_OF_SEEDS = ("margin", "fp32_baseline")
_OF_TRAINING = (
    *("steps", "seeds", *_OF_SEEDS, "train_metric", "accumulate", "clip_norm", "loss_scale"),
    *(*_OF_A_SCALE, "checkpoint", "checkpoint_every"),
)
_OF_ONNX = ("io_types", "opset", "external_data")
_LEAVE_ONE_OUT = "Leave one out."


def convert_settings(source: str, given: Mapping[str, object]) -> Settings:
    """The settings of `amp-convert convert`, from the flags that were `given`, None for absent.

    A flag of training asks for training. One that would do nothing beside the others is refused,
    for whoever gave it expects something; what stands in pyproject.toml waits for the run that it
    is for, and gives way to a flag that says something else. Raises UsageError as `load_settings`
    does, and for seeds that make no test.
    """
    settings = load_settings(source, given)
    settings = _with_onnx(settings, given)
    asked = [name for name in _OF_TRAINING if given.get(name) is not None]
    if asked and given.get("train") is False:
        raise UsageError(f"--no-train and {_flag(asked[0])} were both given", mend=_LEAVE_ONE_OUT)
    if asked:
        settings = dataclasses.replace(settings, train=True)
    if settings.train is False:
        return settings
    for name in asked:
        _refuse_idle(name, settings)
    settings = _one_margin(settings, asked)
    has_margin = settings.margin is not None or settings.fp32_baseline is not None
    require_test(settings.seeds or 1, has_margin=has_margin)
    return settings


def _with_onnx(settings: Settings, given: Mapping[str, object]) -> Settings:
    """The settings, with ONNX where a flag of it was given."""
    if any(given.get(name) is not None for name in _OF_ONNX):
        return dataclasses.replace(settings, onnx=True)
    return settings


def _refuse_idle(name: str, settings: Settings) -> None:
    """Raises UsageError for a flag that does nothing beside the others."""
    if name in _OF_SEEDS and settings.seeds in (None, 1):
        why, more = "with one seed", f"--seeds {LOOKS[0]} to {LOOKS[-1]}"
    elif name in _OF_A_SCALE and settings.loss_scaling != "dynamic":
        default = "" if settings.loss_scale else f", the default for {settings.dtype}"
        why = f"with a loss scale of {settings.loss_scaling}{default}"
        more = "--loss-scale dynamic"
    elif name == "checkpoint_every" and settings.checkpoint is None:
        why, more = "without a checkpoint", "--checkpoint DIR"
    else:
        return
    mend = f"Give {more} as well, or leave it out."
    raise UsageError(f"{_flag(name)} does nothing {why}", mend=mend)


def _one_margin(settings: Settings, asked: Collection[str]) -> Settings:
    """The settings with one source of the margin at most: a flag before pyproject.toml."""
    if settings.margin is None or settings.fp32_baseline is None:
        return settings
    match [name for name in ("margin", "fp32_baseline") if name in asked]:
        case ["margin"]:
            return dataclasses.replace(settings, fp32_baseline=None)
        case ["fp32_baseline"]:
            return dataclasses.replace(settings, margin=None)
    raise UsageError("--margin and --fp32-baseline were both given", mend=_LEAVE_ONE_OUT)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
