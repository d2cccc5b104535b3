"""What a user may ask for: all settings (see `read_settings` for where their values come from).

Each setting is declared once, as a field of `Settings`: its type says which values it takes, its
`Option` what `--help` and the documentation say of it. The flag, the key in pyproject.toml, the
checks (by pydantic) and the tables in the documentation all come from there.

This module runs at start-up: it imports neither torch nor the user's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    TypeAdapter,
)


class Part(StrEnum):
    """What a setting is about: its place in the documentation."""

    CONVERSION = "conversion"
    TRAINING = "training"
    ONNX = "onnx"


@dataclass(frozen=True)
class Option:
    """What is said of a setting. `value` stands for its value, as in `--steps N`; `default` says in
    words what holds where it is not given, for those whose default is no value of their own. A
    relative path in pyproject.toml starts from that file (`is_path`)."""

    help: str
    value: str = ""
    default: str = ""
    part: Part = Part.CONVERSION
    is_path: bool = False


@dataclass(frozen=True)
class Wanted:
    """What to give in place of a value that a type refuses."""

    text: str


# --- the types of values -------------------------------------------------------------------------


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError("no power of two")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _as_scale(value: object) -> object:
    """A loss scale as text: the number of one that is fixed, "1024"."""
    if value in ("dynamic", "none"):
        return value
    number = float(value) if isinstance(value, str) else value
    return f"{TypeAdapter(PowerOfTwo).validate_python(number):.0f}"


SEEDS = "5 to 12"
"""How many make a test, see `noninferiority`."""

Finite = Field(strict=True, allow_inf_nan=False)
Text = Annotated[str, Field(strict=True, min_length=1)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**9), Wanted("a whole number from 1 to 10**9")]
Amount = Annotated[float, Finite, Field(ge=0), Wanted("a finite number of at least 0")]
Positive = Annotated[float, Finite, Field(gt=0), Wanted("a finite number above 0")]
Growth = Annotated[float, Finite, Field(gt=1), Wanted("a finite number above 1")]
Share = Annotated[float, Finite, Field(gt=0, lt=1), Wanted("a number between 0 and 1")]
_POWERS = "a power of two from 1 to 2**127"  # the largest in FP32
PowerOfTwo = Annotated[
    float, Finite, Field(ge=1, lt=2.0**128), AfterValidator(_power_of_two), Wanted(_POWERS)
]
LossScale = Annotated[Text, BeforeValidator(_as_scale), Wanted(f"dynamic, none, or {_POWERS}")]
Switch = Annotated[StrictBool, Wanted("true or false")]
File = Annotated[Text, BeforeValidator(_as_text), Wanted("a path")]
Name = Annotated[Text, Wanted("a name")]
Dtype = Annotated[Literal["float16", "bfloat16"], Wanted("float16 or bfloat16")]
IoTypes = Annotated[Literal["keep", "low"], Wanted("keep or low")]
DeviceName = Annotated[
    Text, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), Wanted("auto, cpu, cuda or cuda:N")
]
RuleNames = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    Wanted("the name of a preset, the path of a rules file, or a list of them"),
]


def _train(help_text: str, value: str = "", default: str = "", *, is_path: bool = False) -> Option:
    return Option(help_text, value, default, Part.TRAINING, is_path)


def _onnx(help_text: str, value: str = "", default: str = "") -> Option:
    return Option(help_text, value, default, Part.ONNX)


@dataclass(frozen=True)
class Settings:
    """The settings of one run; every field is a flag of the same name.

    `cache` is whether graphs and ranges are kept for later runs, and taken from earlier ones, by
    the digest of all that they depend on.

    `fold_batch_norm` is for those who deploy `freeze(fold_batch_norm=True)`: that model is then an
    arm of its own. `profile` times each layer. `compile` judges the model under `torch.compile`
    too, which `cuda_graphs` lets use CUDA graphs.

    `calibrate` and `batches` count batches (the latter: evaluated at most, within `eval_seconds`),
    `steps` optimizer steps, `seeds` training pairs. `tolerance` bounds the relative L2 error of an
    output, and `metric_tolerance` the loss in a metric, relative to its FP32 value; `min_speedup`
    is in times FP32's speed. None means that the stage concerned chooses.

    With `onnx` the model is written as ONNX too: in `opset`, with inputs and outputs in FP32
    (`io_types` "keep") or in the low dtype ("low"), and weights in a file of their own where
    `external_data` says so.

    In training, `accumulate` batches make a step and `clip_norm` bounds the gradients' L2 norm.
    `loss_scale` is "dynamic", "none" or a fixed power of two, None what the dtype needs; a dynamic
    one starts at `initial_scale` and follows `scale_growth`, `scale_backoff` and `scale_interval`,
    as in `torch.amp.GradScaler`. `train_metric` is what training is judged by, over seeds
    against `margin` in its own unit or that of the file `fp32_seeds`. `checkpoint` is a folder,
    written every `checkpoint_every` steps.
    """

    dtype: Annotated[Dtype, Option("The low precision.", "float16|bfloat16")] = "float16"
    rules: Annotated[
        RuleNames, Option("Presets ({presets}) or rules files; later ones win.", "NAME|FILE ...")
    ] = ("default",)
    device: Annotated[
        DeviceName,
        Option("Where to run; also cuda:N. auto takes CUDA where there is one.", "auto|cpu|cuda"),
    ] = "auto"
    out: Annotated[
        File | None,
        Option("The report's folder.", "DIR", "reports/<MODEL's stem>", is_path=True),
    ] = None
    baseline: Annotated[
        File | None, Option("Gate the result on this baseline too.", "FILE", is_path=True)
    ] = None
    calibrate: Annotated[Count, Option("Eval batches that the guards measure on.", "N")] = 4
    batches: Annotated[
        Count | None, Option("Eval batches to compare on at most.", "N", "all of them")
    ] = None
    eval_seconds: Annotated[
        Positive, Option("How long eval batches are compared; the verdict asks for all.", "X")
    ] = 600.0
    train: Annotated[
        Switch | None,
        _train("Train beside FP32, too.", default="where MODEL defines train_batches and loss"),
    ] = None
    steps: Annotated[
        Count | None,
        _train("Training steps.", "N", "as many as there are batches for, up to 50"),
    ] = None
    seeds: Annotated[
        Count | None,
        _train(f"Train up to N pairs, {SEEDS}, and test that mixed is not worse.", "N", "1"),
    ] = None
    onnx: Annotated[
        Switch, Option("Write the model as ONNX too, and check it in ONNX Runtime.")
    ] = False
    save: Annotated[
        Switch, Option("Save the frozen model as a torch.export archive too, and check it.")
    ] = False
    io_types: Annotated[
        IoTypes, _onnx("ONNX inputs and outputs in FP32, or in the low dtype.", "keep|low")
    ] = "keep"
    opset: Annotated[Count | None, _onnx("ONNX opset.", "N", "the first that suffices")] = None
    external_data: Annotated[Switch, _onnx("ONNX weights in a file of their own.")] = False
    cache: Annotated[
        Switch,
        Option(
            "Keep what tracing and calibrating find, and take it from earlier runs.",
        ),
    ] = False
    fold_batch_norm: Annotated[
        Switch, Option("Judge the frozen model with BatchNorm folded into weights, too.")
    ] = False
    compile: Annotated[
        Switch, Option("Judge and time the model under torch.compile too, with a training step.")
    ] = False
    cuda_graphs: Annotated[Switch, Option("With --compile: let it use CUDA graphs.")] = False
    profile: Annotated[
        Switch, Option("Time each layer, in FP32, under autocast, converted and frozen.")
    ] = False
    attribute: Annotated[
        Switch,
        Option("Say which layers the error comes from, by a few backward passes.", default="on"),
    ] = True
    tolerance: Annotated[
        Amount | None,
        Option("Largest relative L2 error of an output.", "X", "0.02, for bfloat16 0.16"),
    ] = None
    metric_tolerance: Annotated[
        Amount, Option("Loss allowed in a metric, relative to FP32.", "X")
    ] = 0.01
    min_speedup: Annotated[
        Positive | None,
        Option("Fail where the frozen model is not X times as fast as FP32.", "X"),
    ] = None
    accumulate: Annotated[Count, _train("Batches to a training step.", "N")] = 1
    clip_norm: Annotated[
        Positive | None, _train("Clip the gradients, unscaled, to this L2 norm.", "X")
    ] = None
    loss_scale: Annotated[
        LossScale | None,
        _train("How the loss is scaled.", "dynamic|none|X", "dynamic, for bfloat16 none"),
    ] = None
    initial_scale: Annotated[PowerOfTwo, _train("Where a dynamic loss scale starts.", "X")] = (
        65536.0
    )
    scale_growth: Annotated[Growth, _train("Its growth factor.", "X")] = 2.0
    scale_backoff: Annotated[Share, _train("Its back-off factor.", "X")] = 0.5
    scale_interval: Annotated[Count, _train("Clean steps before it grows.", "N")] = 2000
    train_metric: Annotated[
        Name | None,
        _train("The metric that training is judged by.", "NAME", "the first, or else the loss"),
    ] = None
    margin: Annotated[
        Positive | None, _train("With --seeds: how much worse the metric may be, in its unit.", "X")
    ] = None
    fp32_seeds: Annotated[
        File | None,
        _train(
            "With --seeds: take the margin from this file of amp-convert fp32-seeds.",
            "FILE",
            is_path=True,
        ),
    ] = None
    checkpoint: Annotated[
        File | None,
        _train("Keep the training's state here, and go on from it.", "DIR", is_path=True),
    ] = None
    checkpoint_every: Annotated[Count, _train("Steps between two of them.", "N")] = 25

    @property
    def loss_scaling(self) -> str:
        """`loss_scale`, or what the dtype needs: BF16 has FP32's exponents, so nothing that FP32
        keeps underflows in it."""
        return self.loss_scale or ("dynamic" if self.dtype == "float16" else "none")


SETTINGS = tuple(field.name for field in fields(Settings))
"""The names of all settings."""


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Settings, include_extras=True)


def _metadata(hint: Any) -> Iterator[object]:
    """What the Annotated types in a type say, the outermost first."""
    yield from getattr(hint, "__metadata__", ())
    for inner in getattr(hint, "__args__", ()):
        yield from _metadata(inner)


def option_of(field: str) -> Option:
    """What is said of a setting."""
    return next(found for found in _metadata(_hints()[field]) if isinstance(found, Option))


def wanted_text(field: str) -> str:
    """What a setting's value should be, in words."""
    return next(found.text for found in _metadata(hint_of(field)) if isinstance(found, Wanted))


def hint_of(field: str) -> Any:
    """The type of a setting, with all that is declared in it."""
    return _hints()[field]


def value_type(field: str) -> type:
    """The plain type of a setting's value: str, int, float, bool or tuple."""
    hint = _hints()[field]
    while hasattr(hint, "__metadata__") or type(None) in getattr(hint, "__args__", ()):
        hint = hint.__args__[0] if type(None) in getattr(hint, "__args__", ()) else hint.__origin__
    origin = getattr(hint, "__origin__", hint)
    found: type = str if origin is Literal else origin
    return found


def flag_of(field: str) -> str:
    """A setting's name as a flag, without the dashes in front, and as a key."""
    return field.replace("_", "-")


def default_text(field: str) -> str:
    """What holds where a setting is not given, in words; "" where that is nothing."""
    said = option_of(field).default
    value = Settings.__dataclass_fields__[field].default
    if said or value in (None, False):
        return said
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
