"""Whose code it is that is loaded, and the digests of its files."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import amp_convert
from amp_convert.core.files import digests

_OWN = os.path.dirname(os.path.abspath(amp_convert.__file__)) + os.sep
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class NoFingerprintError(Exception):
    """Something that no digest can be made of; the message says what."""


def loaded_files() -> Iterable[tuple[str, str]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")  # __getattr__ may be a user's
        if isinstance(file, str) and not file.startswith((_OWN, _TORCH)) and not _pythons(file):
            yield name, file


def loaded_code() -> frozenset[str]:
    """The files whose code is loaded."""
    return frozenset(file for _, file in loaded_files())


def loaded_since(before: frozenset[str]) -> Mapping[str, str]:
    """The digests of the files whose code was loaded after `before` was taken."""
    return {file: of_file(file) for file in sorted(loaded_code() - before)}


def of_file(file: str) -> str:
    """The digest of a file of code: of its text, or for an installed one of its size and time.
    Raises NoFingerprintError where it cannot be read, as in an archive."""
    path = Path(file)
    try:
        if path.is_file() and not is_installed(file):
            return digests.of_file(path)
        if path.is_file():
            state = path.stat()
            return f"{state.st_size} {state.st_mtime_ns}"
    except (OSError, ValueError) as error:
        raise NoFingerprintError(f"{file}: {error}") from error
    raise NoFingerprintError(f"{file} is no file that can be read")


@functools.cache
def _packages() -> tuple[str, ...]:
    return tuple(f + os.sep for f in (*site.getsitepackages(), site.getusersitepackages()))


def is_installed(file: str) -> bool:
    return file.startswith(_packages())


def _pythons(file: str) -> bool:
    """Whether a file is of Python's own library, which its version names."""
    return file.startswith(_LIBRARY) and not is_installed(file)


def is_users(name: str) -> bool:
    """Whether a module is the user's, or none that is imported."""
    file = getattr(sys.modules.get(name), "__dict__", {}).get("__file__")
    if file is None:
        return name not in sys.builtin_module_names and name not in sys.stdlib_module_names
    return not (file.startswith((_OWN, _TORCH)) or _pythons(file) or is_installed(file))


def has_name(value: Any) -> bool:
    """Whether a function or class is found by its name in a module that stands in a file, whose
    text is in the digest of code."""
    found: Any = sys.modules.get(value.__module__ or "")
    if not stands_in_a_file(value.__module__):
        return False
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def stands_in_a_file(module: str | None) -> bool:
    return getattr(sys.modules.get(module or ""), "__dict__", {}).get("__file__") is not None


@functools.cache
def own_text() -> str:
    files = sorted(Path(_OWN).rglob("*.py"))
    return digests.of_text("".join(digests.of_file(file) for file in files))
