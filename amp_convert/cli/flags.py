"""The command line's flags: made from the settings, and which of them go together.

What a flag is called, takes and says stands with its setting (see `loading.settings`); a command
names the settings that it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from amp_convert.loading.read_settings import load_settings
from amp_convert.loading.settings import (
    SETTINGS,
    Part,
    Settings,
    default_text,
    flag_of,
    option_of,
    value_type,
)
from amp_convert.loading.together import agreed
from amp_convert.rules.load import preset_names
from amp_convert.validate.training.noninferiority import require_test

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
    declared = [f"{flag}/{_off(name)}"] if _off(name) else [flag]
    option = typer.Option(*declared, metavar=said.value or None, help=help_of(name))
    annotation: Any = Annotated[_TYPES[kind], option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _off(name: str) -> str:
    """The flag that switches a setting off, where one is needed."""
    switch = value_type(name) is bool and Settings.__dataclass_fields__[name].default is not False
    return f"--no-{flag_of(name)}" if switch else ""


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
            flag = f"{flag}`, `{_off(name)}" if _off(name) else flag
            text = option.help.format(presets=", ".join(preset_names()))
            default = default_text(name).replace("<", "&lt;")
            rows.append(f"| `{flag}` | {text} | {default} |")
    return "\n".join(rows) + "\n"


def convert_settings(source: str, given: Mapping[str, object]) -> Settings:
    """The settings of `amp-convert convert`, from the flags that were `given`, None for absent.

    Raises UsageError as `load_settings` and `agreed` do, and for seeds that make no test.
    """
    settings = agreed(load_settings(source, given), given)
    if settings.train is False:
        return settings
    has_margin = settings.margin is not None or settings.fp32_seeds is not None
    require_test(settings.seeds or 1, has_margin=has_margin)
    return settings
