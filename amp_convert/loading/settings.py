"""What the user asked for: flags, then `[tool.amp-convert]`, then defaults.

The table is read from one file only: the nearest pyproject.toml, going up from the model file's
folder, whether or not it has the table. Its keys are the flags' names without the dashes in
front (`metric-tolerance = 0.02`), and relative paths in it start from its own folder. Values
from both places pass the same checks, so nothing that a flag refuses can come in by the file.
This module runs at start-up: it imports neither torch nor the user's code.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from amp_convert.core.errors import UsageError

_NAME = r"[^\W\d]\w*"
_TABLE = "pyproject.toml [tool.amp-convert]"


@dataclass(frozen=True)
class Settings:
    """The settings of one run; every field is a flag of the same name.

    `calibrate` and `batches` count batches (the latter: evaluated at most), `steps` optimizer
    steps, `seeds` training pairs. `tolerance` bounds the relative L2 error of an output, and
    `metric_tolerance` the loss in a metric, relative to its FP32 value. None means that the
    stage concerned chooses.

    With `onnx` the model is written as ONNX too: in `opset`, with inputs and outputs in FP32
    (`io_types` "keep") or in the low dtype ("low"), and weights in a file of their own where
    `external_data` says so.

    In training, `accumulate` batches make a step and `clip_norm` bounds the gradients' L2 norm.
    `loss_scale` is "dynamic", "none" or a fixed power of two, None what the dtype needs; a dynamic
    one starts at `initial_scale` and follows `scale_growth`, `scale_backoff` and `scale_interval`,
    as in `torch.amp.GradScaler`. `train_metric` is what training is judged by, over seeds
    against `margin` in its own unit or that of the file `fp32_baseline`. `checkpoint` is a folder,
    written every `checkpoint_every` steps.
    """

    dtype: str = "float16"
    rules: tuple[str, ...] = ("default",)
    device: str = "auto"
    out: str | None = None
    baseline: str | None = None
    calibrate: int = 4
    batches: int = 8
    train: bool | None = None
    steps: int | None = None
    seeds: int | None = None
    onnx: bool = False
    io_types: str = "keep"
    opset: int | None = None
    external_data: bool = False
    tolerance: float | None = None
    metric_tolerance: float = 0.01
    accumulate: int = 1
    clip_norm: float | None = None
    loss_scale: str | None = None
    initial_scale: float = 65536.0
    scale_growth: float = 2.0
    scale_backoff: float = 0.5
    scale_interval: int = 2000
    train_metric: str | None = None
    margin: float | None = None
    fp32_baseline: str | None = None
    checkpoint: str | None = None
    checkpoint_every: int = 25

    @property
    def loss_scaling(self) -> str:
        """`loss_scale`, or what the dtype needs: BF16 has FP32's exponents, so nothing that FP32
        keeps underflows in it."""
        return self.loss_scale or ("dynamic" if self.dtype == "float16" else "none")


def load_settings(model_source: str, flags: Mapping[str, object]) -> Settings:
    """Settings for a run on `model_source`, a path or `package.module:attribute`.

    `flags` maps a flag's name (`metric_tolerance` or `metric-tolerance`) to its value; None or
    an empty sequence means that the flag was not given.

    Raises UsageError for a pyproject.toml that is not TOML, an unknown key, or a wrong value.
    """
    values = _from_pyproject(model_folder(model_source))
    for name, value in flags.items():
        if value is not None and value != () and value != []:
            flag = name.replace("_", "-")
            field = _field(flag, f"--{flag}")
            values[field] = _checked(flag, value, f"--{flag}")
    return Settings(**values)


def split_source(source: str) -> tuple[str, str]:
    """`source` as (file or module, attribute); the attribute is "" when there is none.

    The first part is a file when it ends in ".py" or when there is no attribute, otherwise a
    module. Any other colon belongs to the path, as in `C:\\nets\\model.py`.
    """
    place, _, attribute = source.rpartition(":")
    dotted = rf"{_NAME}(\.{_NAME})*"
    if re.fullmatch(dotted, attribute) and (
        place.endswith(".py") or (re.fullmatch(dotted, place) and not os.path.exists(source))
    ):
        return place, attribute
    return source, ""


def model_folder(source: str) -> Path:
    """The folder of the model file, found without running any of it.

    A module that is not under the current folder counts as lying in the current folder: an
    installed package's own pyproject.toml is not the user's.
    """
    place, attribute = split_source(source)
    if place.endswith(".py") or not attribute:
        return Path(os.path.abspath(place)).parent
    path = Path.cwd().joinpath(*place.split("."))
    if path.is_dir():
        return path
    return path.parent if path.with_suffix(".py").is_file() else Path.cwd()


def _from_pyproject(folder: Path) -> dict[str, Any]:
    path = next(
        (p for f in (folder, *folder.parents) if (p := f / "pyproject.toml").is_file()), None
    )
    if path is None:
        return {}
    try:
        table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        what = f"pyproject.toml is not valid TOML: {str(error).rstrip('.')}"
        raise UsageError(what, where=str(path), mend="Correct that file.") from error
    for key in ("tool", "amp-convert"):
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise UsageError(
                f"{key} is not a table", where=_TABLE, mend="Write [tool.amp-convert]."
            )
    return {
        _field(key, _TABLE): _anchored(key, _checked(key, value, _TABLE), path.parent)
        for key, value in table.items()
    }


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """`value` with relative paths made absolute from `folder`; a preset's name stays."""
    if key in ("out", "baseline", "fp32-baseline", "checkpoint"):
        return str(folder / value)
    if key == "rules":
        return tuple(
            str(folder / rule) if rule.endswith(".toml") or re.search(r"[/\\]", rule) else rule
            for rule in value
        )
    return value


def _field(key: str, where: str) -> str:
    if key in _CHECKS:
        return key.replace("-", "_")
    near = difflib.get_close_matches(key, _CHECKS, n=1)
    mend = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(sorted(_CHECKS))}."
    raise UsageError(f"unknown setting {key}", where=where, mend=mend)


def _checked(key: str, value: object, where: str) -> Any:
    try:
        return _CHECKS[key](value)
    except ValueError as error:
        raise UsageError(f"{key} is {value!r}", where=where, mend=f"Give {error}.") from error


# Each check returns the value in its field's type, or raises ValueError with what to give instead.


def _dtype(value: object) -> str:
    if value == "float16" or value == "bfloat16":
        return str(value)
    raise ValueError("float16 or bfloat16")


def _device(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
        return value
    raise ValueError("auto, cpu, cuda or cuda:N")


def _rules(value: object) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if (
        isinstance(entries, list | tuple)
        and entries
        and all(isinstance(entry, str) and entry for entry in entries)
    ):
        return tuple(entries)
    raise ValueError("the name of a preset, the path of a rules file, or a list of them")


def _path(value: object) -> str:
    if isinstance(value, str | Path) and str(value):
        return str(value)
    raise ValueError("a path")


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("a whole number of at least 1")


def _number(value: object) -> float:
    """`value` as a float; NaN, which every comparison refuses, unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) <= sys.float_info.max else math.nan


def _amount(value: object) -> float:
    if (number := _number(value)) >= 0:
        return number
    raise ValueError("a finite number of at least 0")


def _between(low: float, high: float, wanted: str) -> Callable[[object], float]:
    def check(value: object) -> float:
        if low < (number := _number(value)) < high:
            return number
        raise ValueError(wanted)

    return check


def _power_of_two(value: object) -> float:
    number = _number(value)
    if 1 <= number < 2.0**128 and math.frexp(number)[0] == 0.5:
        return number
    raise ValueError("a power of two from 1 to 2**127")  # the largest in FP32


def _loss_scale(value: object) -> str:
    if value == "dynamic" or value == "none":
        return str(value)
    try:
        number = _power_of_two(float(value) if isinstance(value, str) else value)
    except ValueError:
        raise ValueError("dynamic, none, or a power of two from 1 to 2**127") from None
    return f"{number:.0f}"


def _io_types(value: object) -> str:
    if value == "keep" or value == "low":
        return str(value)
    raise ValueError("keep or low")


def _name(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError("a name")


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


_positive = _between(0, math.inf, "a finite number above 0")
_BY_FIELD: dict[str, Callable[[object], object]] = {
    "dtype": _dtype,
    "rules": _rules,
    "device": _device,
    "out": _path,
    "baseline": _path,
    "calibrate": _count,
    "batches": _count,
    "train": _switch,
    "steps": _count,
    "seeds": _count,
    "onnx": _switch,
    "io_types": _io_types,
    "opset": _count,
    "external_data": _switch,
    "tolerance": _amount,
    "metric_tolerance": _amount,
    "accumulate": _count,
    "clip_norm": _positive,
    "loss_scale": _loss_scale,
    "initial_scale": _power_of_two,
    "scale_growth": _between(1, math.inf, "a finite number above 1"),
    "scale_backoff": _between(0, 1, "a number between 0 and 1"),
    "scale_interval": _count,
    "train_metric": _name,
    "margin": _positive,
    "fp32_baseline": _path,
    "checkpoint": _path,
    "checkpoint_every": _count,
}
SETTINGS = tuple(field.name for field in fields(Settings))
"""The names of all settings."""
_CHECKS = {field.name.replace("_", "-"): _BY_FIELD[field.name] for field in fields(Settings)}
