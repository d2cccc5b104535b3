"""Valid texts made wrong: in their structure, where they can still be read, and byte by byte.

A mutation draws all that it needs from the `random.Random` that it is given, so a case is made
again from its seed. Values that no writer of JSON or TOML would write, such as 1e999, go into the
text in the place of a token.
"""

from __future__ import annotations

import copy
import json
import random
import tomllib
from collections.abc import Callable
from typing import Any

Write = Callable[[Any], str]


class Raw(str):
    """A value that is written as it is."""

    __slots__ = ()


_DEEP = Raw("[" * 100_000)
HOSTILE: tuple[Any, ...] = (
    *(True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**4000, 0.0, -0.0, 0.5, 1e308),
    *(5e-324, "", " ", "1", "NaN", "Infinity", "1e999", "%s%n{}", "\0", "a\0b", "\u202e🙂"),
    *("\x1b[2J\x1b]0;x\x07", "a\n::error::b", "::set-output name=x::y", "x" * 100_000, "*" * 50),
    *("../../treasure", "treasure", "/dev/zero", "/", ".", "loop", "loop/x.toml", "~", "default"),
    *("aten.*", "aten.[", "[!]", "*a" * 200, [], {}, [[]], [1, "a", None], {"a": 1}, {"": {}}),
    *(Raw("1" * 5_000), Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("nan"), Raw("inf")),
    *(_DEEP, Raw('{"a":' * 50_000), Raw("[" * 150 + "]" * 150), Raw("[" * 250 + "]" * 250)),
    *(Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("null"), Raw("0x" + "f" * 3_000), Raw("1979-05-27")),
    *(Raw("{a." + "b." * 5_000 + "c = 1}"), Raw('"""\\' * 5_000), Raw("[1,"), Raw("'" * 3)),
)
_PLAIN = tuple(value for value in HOSTILE if not isinstance(value, Raw))
_BYTES = (
    b"\0",
    b"\xff",
    b"\x1b[2J",
    b"\r",
    b"\n::error::\n",
    b'"',
    b"\\",
    b"[",
    b"{",
    b"\xed\xa0\x80",
)


def mutated_json(text: str, luck: random.Random) -> bytes:
    """A JSON text, changed in one to three places."""
    return _mutated(text, json.loads, _json, luck)


def mutated_toml(text: str, luck: random.Random) -> bytes:
    """A TOML text, changed in one to three places."""
    return _mutated(text, tomllib.loads, _toml, luck)


def mutated_bytes(data: bytes, luck: random.Random) -> bytes:
    """Bytes that were flipped, cut off, taken out, put in, or repeated."""
    spoilt = bytearray(data)
    for _ in range(luck.choice((1, 1, 2, 8))):
        at, length = luck.randrange(len(spoilt) + 1), luck.choice((1, 2, 30, 500))
        kind = luck.randrange(6)
        if kind == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << luck.randrange(8)
        elif kind == 1:
            del spoilt[at:]
        elif kind == 2:
            del spoilt[at : at + length]
        elif kind == 3:
            spoilt[at:at] = luck.choice(_BYTES)
        elif kind == 4:
            spoilt[at:at] = spoilt[at : at + length] * luck.choice((1, 2, 1_000))
        else:
            spoilt[at:at] = spoilt[: luck.randrange(len(spoilt) + 1)]
    return bytes(spoilt[: 2 * len(data) + 400_000])


def _mutated(text: str, read: Callable[[str], Any], write: Write, luck: random.Random) -> bytes:
    if luck.random() < 0.25:
        return mutated_bytes(text.encode(), luck)
    document = read(text)
    for _ in range(luck.choice((1, 1, 2, 3))):
        _change(document, luck)
    made = write(document).encode(errors="surrogatepass")
    return mutated_bytes(made, luck) if luck.random() < 0.1 else made


def _change(document: Any, luck: random.Random) -> None:
    """One change somewhere inside a document."""
    held = document
    while True:  # downwards, for as long as luck has it
        keys = list(held) if isinstance(held, dict) else range(len(held))
        inner = [key for key in keys if isinstance(held[key], dict | list) and held[key]]
        if not inner or luck.random() < 0.25:
            break
        held = held[luck.choice(inner)]
    value = copy.deepcopy(luck.choice(HOSTILE if luck.random() < 0.3 else _PLAIN))
    if isinstance(held, list):
        at = luck.randrange(len(held)) if held else 0
        if luck.random() < 0.6 and held:
            held[at] = value
        else:
            held[at:at] = [value] * luck.choice((1, 1, _many(value, 2_000)))
        return
    key = luck.choice(list(held)) if held else "a"
    kind = luck.randrange(10)
    if kind < 5:
        held[key] = value
    elif kind == 5:
        held.pop(key, None)
    elif kind == 6:
        held[_name(luck)] = held.pop(key, value)
    elif kind == 7:
        held[_name(luck)] = value
    elif kind == 8:
        held[key] = Raw(_repeated(held.get(key, value), key))
    else:
        names = [f"{_name(luck)[:200]}{index}" for index in range(_many(value, 300))]
        held.update(dict.fromkeys(names, value))


def _many(value: Any, times: int) -> int:
    """So many copies of a value, but no megabytes."""
    return times if len(str(value)[:1_000]) < 1_000 else 1


def _name(luck: random.Random) -> str:
    return luck.choice([text for text in HOSTILE if type(text) is str])


def _repeated(value: Any, key: str) -> str:
    """A value, and behind it the same key once more. In TOML, on a line of its own, where that
    makes one."""
    written = _json(value)
    return f"{written}, {json.dumps(key)}: {written}" if len(key) % 2 else f"{written}\n{key} = 1"


def _json(value: Any) -> str:
    tokens: dict[str, str] = {}
    text = json.dumps(_marked(value, tokens), indent=1)
    for token, raw in tokens.items():
        text = text.replace(f'"{token}"', raw, 1)
    return text


def _marked(value: Any, tokens: dict[str, str]) -> Any:
    if isinstance(value, Raw):
        token = f"raw{len(tokens)}raw"
        tokens[token] = str(value)
        return token
    if isinstance(value, dict):
        return {key: _marked(held, tokens) for key, held in value.items()}
    return [_marked(held, tokens) for held in value] if isinstance(value, list) else value


def _toml(document: dict[str, Any]) -> str:
    lines, tables = [], []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            tables += _table(_key(key), value)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            tables += [line for v in value for line in [f"[[{_key(key)}]]", *_entries(v)]]
        else:
            lines.append(f"{_key(key)} = {_inline(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _table(name: str, table: dict[str, Any]) -> list[str]:
    inner = {k: v for k, v in table.items() if isinstance(v, dict) and v}
    lines = [f"[{name}]", *_entries({k: v for k, v in table.items() if k not in inner})]
    for key, value in inner.items():
        lines += _table(f"{name}.{_key(key)}", value)
    return lines


def _entries(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_inline(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _text(key)


def _text(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


def _inline(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    return json.dumps(value) if isinstance(value, bool | int | float) else '"none"'
