"""Reading files that somebody else may have written: a bound on everything, and plain errors.

A file is read up to a size and no further, since a path may also be a device without an end. JSON
and TOML are refused where they are nested without end, hold numbers that no run writes, or say a
key twice, of which a reader would see one value and a program the other. All that is wrong with a
text is a ValueError whose message is a clause; that a file cannot be read is an OSError.

tomllib takes time quadratic in the parts of a dotted key. Such keys are looked for before it, so
that reading is linear in the text.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from amp_convert.core.printable import clip

LARGEST = 256 * 2**20
"""Bytes. A report of ten thousand nodes has 20 MiB."""
LARGEST_TOML = 16 * 2**20
"""Bytes. A plan that pins ten thousand nodes has 3 MiB."""
DEEPEST = 200
"""Levels of nesting."""
_PARTS = 16
_DIGITS = 18
_PART = r"""(?:[\w-]++|"(?:\\.|[^"\\\n])*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
# A key starts a line, a header or an entry of an inline table.
_LONG_KEY = re.compile(rf"(?:^|[{{,])[ \t]*+\[{{0,2}}[ \t]*+(?:{_PART}){{{_PARTS},}}", re.MULTILINE)

# A string without an end takes the rest, so that no text is scanned twice.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKET = bytes(set(range(256)) - set(_STEPS))


def read_file(path: Path, most: int = LARGEST, *, follow: bool = True) -> bytes:
    """The bytes of a file. With `follow` False its last name must be a file, not a link to one: in
    a folder that others may write to, a link could lead anywhere."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not follow and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a file", str(path))
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most // 2**20} MiB")
    return data


def parse_json(data: bytes, digits: int = _DIGITS) -> Any:
    """The value of a JSON text in UTF-8, whose whole numbers have at most `digits` digits."""

    def whole(text: str) -> int:
        if len(text.lstrip("-")) > digits:
            raise ValueError(f"the number {clip(text, 24)} has {len(text)} digits")
        return int(text)

    _refuse_deep_json(data)
    return json.loads(
        _decoded(data),
        object_pairs_hook=_unrepeated,
        parse_int=whole,
        parse_float=_finite,
        parse_constant=_refuse,
    )


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """The table of a TOML text. What is not TOML is a TOMLDecodeError, which names the line."""
    text = data if isinstance(data, str) else _decoded(data)
    if found := _LONG_KEY.search(text):
        line = text.count("\n", 0, found.start() + 1) + 1
        raise ValueError(f"line {line} has a key of more than {_PARTS} parts")
    _refuse_deep_toml(text)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # of Python, which limits the digits of a number
        raise ValueError("it holds a number of thousands of digits") from None
    _refuse_deep(table)
    return table


def _refuse_deep(value: object) -> None:
    """Raises ValueError where dicts and lists are nested more than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        containers = [held for held in level if isinstance(held, dict | list)]
        if not containers:
            return
        inner = (held.values() if isinstance(held, dict) else held for held in containers)
        level = list(itertools.chain.from_iterable(inner))
    raise ValueError("it is nested too deeply")


def _refuse_deep_toml(text: str) -> None:
    """The same for a TOML text, by its brackets outside of strings and comments. One that is not
    closed ends the search: the parser says where it begins."""
    depth = position = 0
    while found := _TOKEN.search(text, position):
        token, position = found[0], found.end()
        if token in _LONG_QUOTES:
            position = text.find(token, position) + len(token)
            if position < len(token):
                return
        elif token[0] in "[]{}":
            if depth + len(token) >= DEEPEST:
                steps = itertools.accumulate((_STEPS[ord(c)] for c in token), initial=depth)
                if max(steps) >= DEEPEST:
                    raise ValueError("it is nested too deeply")
            depth += sum(map(token.count, "[{")) - sum(map(token.count, "]}"))


_LONG_QUOTES = ('"""', "'''")
_TOKEN = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\\n])*+"?|\'[^\'\n]*+\'?|#[^\n]*+|[][{}]++')


def _refuse_deep_json(data: bytes) -> None:
    """The same for a JSON text, by its brackets: making the values first takes twenty times
    longer."""
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKET)
    if max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0) >= DEEPEST:
        raise ValueError("it is nested too deeply")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {clip(key, 80)!r} is repeated")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {clip(text, 24)} is too large")
    return value


def _refuse(token: str) -> Any:
    raise ValueError(f"{token} is not JSON")
