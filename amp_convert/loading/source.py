"""What names a model, `nets/model.py` or `package.nets:Net`, and the folders that follow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from amp_convert.core.errors import UsageError

SOURCES = "Give the path of a .py file, or package.module:attribute."
_NAME = r"[^\W\d]\w*"


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


def output_folder(source: str, out: str | None, suffix: str = "") -> Path:
    """Where the report goes: `--out`, or `reports/<the model file's stem><suffix>` in the current
    folder. Raises UsageError for a source without a stem, such as ".".
    """
    if out:
        return Path(out)
    stem = _stem(source)
    if stem in ("", ".."):
        raise UsageError(f"{source!r} is not the name of a model file", mend=SOURCES)
    return Path("reports") / f"{stem}{suffix}"


def _stem(source: str) -> str:
    place, attribute = split_source(source)
    is_file = place.endswith(".py") or not attribute
    return Path(place).stem if is_file else place.rpartition(".")[2]


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
