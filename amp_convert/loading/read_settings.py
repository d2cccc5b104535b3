"""Settings from flags, then `[tool.amp-convert]`, then defaults.

The table is read from one file only: the nearest pyproject.toml, going up from the model file's
folder, whether or not it has the table. Its keys are the flags' names without the dashes in
front (`metric-tolerance = 0.02`), and relative paths in it start from its own folder. Values
from both places pass the same checks, so nothing that a flag refuses can come in by the file.
This module runs at start-up: it imports neither torch nor the user's code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    TypeAdapter,
    ValidationError,
)

from amp_convert.core.errors import UsageError
from amp_convert.core.files.reading import LARGEST_TOML, parse_toml, read_file
from amp_convert.core.printable import is_text
from amp_convert.core.spelling import nearest
from amp_convert.loading.settings import (
    SETTINGS,
    Settings,
    flag_of,
    hint_of,
    option_of,
    wanted_text,
)
from amp_convert.loading.source import model_folder

_TABLE = "pyproject.toml [tool.amp-convert]"


def load_settings(model_source: str, flags: Mapping[str, object]) -> Settings:
    """Settings for a run on `model_source`, a path or `package.module:attribute`.

    `flags` maps a flag's name (`metric_tolerance` or `metric-tolerance`) to its value; None or
    an empty sequence means that the flag was not given.

    Raises UsageError for a pyproject.toml that is not TOML, an unknown key, or a wrong value.
    """
    _refuse_unwritable("MODEL", model_source, "")
    values = _from_pyproject(model_folder(model_source))
    for name, value in flags.items():
        if value is not None and value != () and value != []:
            flag = name.replace("_", "-")
            field = _field(flag, f"--{flag}")
            values[field] = _checked(field, value, f"--{flag}")
    return Settings(**values)


def given_settings(values: Mapping[str, object]) -> dict[str, object]:
    """Values given in a program under the settings' names of today, without those that are absent.
    Raises UsageError for an unknown name."""
    return {
        _field(flag_of(name), "settings"): value
        for name, value in values.items()
        if value is not None
    }


def make_settings(**values: object) -> Settings:
    """Settings from values given in a program; None for those that are absent. Raises UsageError
    for an unknown name or a wrong value."""
    given = given_settings(values)
    return Settings(**{n: _checked(n, value, "settings") for n, value in given.items()})


def _from_pyproject(folder: Path) -> dict[str, Any]:
    path = next(
        (p for f in (folder, *folder.parents) if (p := f / "pyproject.toml").is_file()), None
    )
    if path is None:
        return {}
    try:
        table: Any = parse_toml(read_file(path, LARGEST_TOML))
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
        field: _anchored(field, _checked(field, value, _TABLE), path.parent)
        for key, value in table.items()
        for field in [_field(key, _TABLE)]
    }


def _anchored(field: str, value: Any, folder: Path) -> Any:
    """`value` with relative paths made absolute from `folder`; a preset's name stays."""
    if option_of(field).is_path:
        return str(folder / value)
    if field == "rules":
        return tuple(
            str(folder / rule) if "." in rule or re.search(r"[/\\]", rule) else rule
            for rule in value
        )
    return value


def _field(key: str, where: str) -> str:
    """The field of the setting that a flag or key names."""
    key = _FORMER.get(key, key)
    known = [flag_of(field) for field in SETTINGS]
    if key in known:
        return key.replace("-", "_")
    near = nearest(key, known)
    mend = f"Did you mean {near}?" if near else "They are the flags of amp-convert convert --help."
    raise UsageError(f"unknown setting {key}", where=where, mend=mend)


def _checked(field: str, value: object, where: str) -> Any:
    """The value in the setting's type."""
    _refuse_unwritable(flag_of(field), value, where)
    try:
        return TypeAdapter(hint_of(field)).validate_python(value)
    except (ValidationError, ValueError, TypeError, OverflowError) as error:
        mend = f"Give {wanted_text(field)}."
        raise UsageError(f"{flag_of(field)} is {_shown(value)}", where=where, mend=mend) from error


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python does not write out more than 4,300 digits
        return "a number of thousands of digits"


def _refuse_unwritable(name: str, value: object, where: str) -> None:
    """Refuse text that can be no path, and that no report could hold."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and not is_text(text):
            what = f"{name} is {text!r}, which holds a NUL or is not Unicode"
            raise UsageError(what, where=where, mend="Give it another name.")


_FORMER = {"fp32-baseline": "fp32-seeds"}
"""Former names of settings, which still hold."""
