"""The command line's flags: made from the settings, and which of them go together.

What a flag is called, takes and says stands with its setting (see `loading.settings`); a command
names the settings that it takes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from amp_convert.core.errors import UsageError
from amp_convert.loading.settings import (
    SETTINGS,
    Part,
    Settings,
    default_text,
    flag_of,
    load_settings,
    option_of,
    value_type,
)
from amp_convert.rules.rule_set import preset_names
from amp_convert.validate.training.noninferiority import LOOKS, require_test

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="model.py, or package.module:attribute.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the libraries' warnings, and tracebacks.")
]


def taking(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command that takes the flags of these settings, and gets those that were given as its
    argument `given`: values by setting, without those that are absent."""

    def wrapped(command: Callable[..., int]) -> Callable[..., int]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for name, p in own.parameters.items() if name != "given"]
        made = [_parameter(name) for name in names if name not in own.parameters]

        @wraps(command)
        def run(**values: Any) -> int:
            given = {n: v for n in names if (v := values.get(n)) is not None and v != []}
            rest = {p.name: values[p.name] for p in kept}
            return command(given=given, **rest)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in sorted(
                [*kept, *made], key=lambda parameter: parameter.name in ("as_json", "debug")
            )
        ]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
        return run

    return wrapped


_TYPES: dict[type, Any] = {
    str: str | None,
    int: int | None,
    float: float | None,
    bool: bool | None,
    tuple: list[str] | None,
}


def _parameter(name: str) -> inspect.Parameter:
    kind = value_type(name)
    said, flag = option_of(name), f"--{flag_of(name)}"
    declared = [f"{flag}/--no-{flag_of(name)}"] if name == "train" else [flag]
    option = typer.Option(*declared, metavar=said.value or None, help=help_of(name))
    annotation: Any = Annotated[_TYPES[kind], option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def help_of(name: str) -> str:
    """What `--help` says of a setting."""
    text = option_of(name).help.format(presets=", ".join(preset_names()))
    default = default_text(name)
    return f"{text} [default: {default}]" if default else text


def table_of(part: Part) -> str:
    """The flags of a part as a Markdown table, for the documentation."""
    rows = ["| Flag | Meaning | Unless given |", "|---|---|---|"]
    for name in SETTINGS:
        option = option_of(name)
        if option.part is part:
            flag = f"--{flag_of(name)} {option.value}".strip().replace("|", "\\|")
            flag = "--train`, `--no-train" if name == "train" else flag
            text = option.help.format(presets=", ".join(preset_names()))
            default = default_text(name).replace("<", "&lt;")
            rows.append(f"| `{flag}` | {text} | {default} |")
    return "\n".join(rows) + "\n"


# --- which go together ---

_OF_A_SCALE = ("initial_scale", "scale_growth", "scale_backoff", "scale_interval")
_OF_SEEDS = ("margin", "fp32_seeds")
_OF_TRAINING = tuple(
    name for name in SETTINGS if option_of(name).part is Part.TRAINING and name != "train"
)
_OF_ONNX = tuple(name for name in SETTINGS if option_of(name).part is Part.ONNX)
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
    has_margin = settings.margin is not None or settings.fp32_seeds is not None
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
    if settings.margin is None or settings.fp32_seeds is None:
        return settings
    match [name for name in ("margin", "fp32_seeds") if name in asked]:
        case ["margin"]:
            return dataclasses.replace(settings, fp32_seeds=None)
        case ["fp32_seeds"]:
            return dataclasses.replace(settings, margin=None)
    raise UsageError("--margin and --fp32-seeds were both given", mend=_LEAVE_ONE_OUT)


def _flag(name: str) -> str:
    return f"--{flag_of(name)}"
