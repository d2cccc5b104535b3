"""One rules file: its words, its schema, and where in the text each thing stands.

Each error names file, line, the wrong word and the nearest right one.
"""

from __future__ import annotations

import operator
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from amp_convert.core.errors import UsageError
from amp_convert.core.files.reading import parse_toml
from amp_convert.core.spelling import nearest
from amp_convert.rules.rule import (
    Category,
    GuardLimits,
    Limit,
    MadeFor,
    Painting,
    Rewrites,
    Rule,
    Target,
)
from amp_convert.rules.toml_source import TomlSource


@dataclass(frozen=True)
class RuleFile:
    """One file, checked. `shown` is its path as errors name it; `guards` those it sets."""

    shown: str
    extends: tuple[str, ...]
    extends_at: str
    painting: Painting | None
    guards: dict[str, Limit]
    rewrites: dict[str, bool]
    made_for: MadeFor | None
    rules: tuple[Rule, ...]


def parse_rule_file(text: str, shown: str, *, preset: bool = False) -> RuleFile:
    """Check `text` as a rules file; `shown` is what errors call it. Raises UsageError.

    Ops of presets are not looked up: they exist in the pinned torch, an older one may lack a few.
    """
    source = TomlSource(shown, text)
    document = _toml(source)
    _known_keys("top-level key", document, _TOP, source.at_key)
    painting = document.get("painting")
    if painting is not None:
        painting = Painting(_choice("painting", painting, source.at_key("painting")))
    tables = document.get("rule", [])
    if not isinstance(tables, list) or len(tables) != len(source.headers):
        mend = "Write every rule under its own [[rule]] line."
        raise UsageError("`rule` is not a list of tables", where=source.at_key("rule"), mend=mend)
    headed = zip(tables, source.headers, strict=True)
    rules = [
        replace(rule, preset=preset)
        for table, line in headed
        for rule in _rules(source, table, line, preset=preset)
    ]
    return RuleFile(
        shown=shown,
        extends=_extends(source, document.get("extends", [])),
        extends_at=source.at_key("extends"),
        painting=painting,
        guards=_guards(source, document.get("guards", {})),
        rewrites=_rewrites(source, document.get("rewrites", {})),
        made_for=_made_for(source, document["made_for"]) if "made_for" in document else None,
        rules=tuple(rules),
    )


def is_glob(pattern: str) -> bool:
    """Whether an op or layer pattern has to be matched, not compared."""
    return any(c in pattern for c in "*?[")


def unknown(
    kind: str, word: str, known: Collection[str], where: str, near: str | None = None
) -> UsageError:
    """The error for a word that is not in `known`; `near` is what to seek the nearest of."""
    close = nearest(near or word, sorted(known))
    if close and len(known) > 2:
        mend = f"Did you mean {str(close)!r}?"
    elif len(known) <= 9:
        mend = f"Known: {', '.join(sorted(known))}."
    else:
        mend = "Write it as in torch.ops, such as 'aten.linear'."
    return UsageError(f"unknown {kind} {word!r}", where=where, mend=mend)


_TOP = ("extends", "painting", "made_for", "guards", "rewrites", "rule")
_OPS = "ops"
_RULE_KEYS = (*Target, _OPS, "category", "reason", "location", "dtype", "device", "mode")
_CHOICES: dict[str, Collection[str]] = {
    "painting": tuple(Painting),
    "category": tuple(Category),
    "dtype": ("float16", "bfloat16"),
    "device": ("cpu", "cuda"),
    "mode": ("eval", "train"),
}


def _toml(source: TomlSource) -> dict[str, Any]:
    try:
        return parse_toml(source.text)
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).partition(" (at ")
        found = re.search(r"line (\d+)", place)
        # `lines` would take time without end: what is not TOML may have strings without one.
        where = source.at(int(found[1]) if found else source.text.count("\n") + 1)
    except ValueError as error:
        what, where = str(error), source.shown
    raise UsageError(f"not TOML: {what.lower()}", where=where, mend="Mend the text there.")


def _extends(source: TomlSource, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        mend = "Write a preset's name, a path, or a list of those."
        raise UsageError("`extends` is not a name", where=source.at_key("extends"), mend=mend)
    return tuple(names)


def _guards(source: TomlSource, table: Any) -> dict[str, Limit]:
    where = source.at_key("guards")
    if table is False:
        return {field.name: False for field in fields(GuardLimits)}
    if not isinstance(table, dict):
        mend = "Write [guards], or guards = false."
        raise UsageError("`guards` is not a table", where=where, mend=mend)
    start = int(where.rpartition(":")[2])
    _known_keys(
        "guard", table, [f.name for f in fields(GuardLimits)], partial(source.at_key, start=start)
    )
    for key, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not False and not (is_number and 0 < value <= sys.float_info.max):
            raise UsageError(
                f"guard `{key}` has the value {value!r}",
                where=source.at_key(key, start),
                mend="Write a number above 0, or false to switch it off.",
            )
    return {key: value and float(value) for key, value in table.items()}


def _rewrites(source: TomlSource, table: Any) -> dict[str, bool]:
    where = source.at_key("rewrites")
    if not isinstance(table, dict):
        raise UsageError("`rewrites` is not a table", where=where, mend="Write [rewrites].")
    at = partial(source.at_key, start=int(where.rpartition(":")[2]))
    _known_keys("rewrite", table, [f.name for f in fields(Rewrites)], at)
    for key, value in table.items():
        if not isinstance(value, bool):
            what = f"rewrite `{key}` has the value {value!r}"
            raise UsageError(what, where=at(key), mend="Write true or false.")
    return table


def _made_for(source: TomlSource, table: Any) -> MadeFor:
    where = source.at_key("made_for")
    if not isinstance(table, dict):
        raise UsageError("`made_for` is not a table", where=where, mend="Write [made_for].")
    at = partial(source.at_key, start=int(where.rpartition(":")[2]))
    _known_keys("key in made_for", table, [f.name for f in fields(MadeFor)], at)
    nodes = {}
    for key in ("clamped", "rescaled"):
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(node, str) for node in value):
            mend = "Write a list of nodes, as plan.toml has them."
            raise UsageError(f"`{key}` is not a list of nodes", where=at(key), mend=mend)
        nodes[key] = frozenset(value)
    for key in ("dtype", "device"):
        if key not in table:
            mend = f"Add a line `{key} = ...`."
            raise UsageError(f"[made_for] has no `{key}`", where=where, mend=mend)
        _choice(key, table[key], at(key))
    return MadeFor(table["dtype"], table["device"], **nodes)


def _rules(source: TomlSource, table: dict[str, Any], line: int, *, preset: bool) -> Iterator[Rule]:
    """The rules of one `[[rule]]`: one an operator that it names."""
    where = partial(source.at_key, start=line)
    _known_keys("key in a rule", table, _RULE_KEYS, where)
    for key, value in table.items():
        if key == _OPS:
            _check_ops(value, where(key))
        elif not isinstance(value, str) or not value.strip():
            mend = "Write a string that is not empty."
            raise UsageError(f"`{key}` is not a text", where=where(key), mend=mend)
        if key in _CHOICES:
            _choice(key, value, where(key))
    targets = [t for t in (*Target, _OPS) if t in table]
    if len(targets) != 1:
        mend = "Give it one of op, ops, layer, module or node."
        raise UsageError(f"a rule has {len(targets)} targets", where=source.at(line), mend=mend)
    for key in ("category", "reason"):
        if key not in table:
            mend = f"Add a line `{key} = ...`."
            raise UsageError(f"a rule has no `{key}`", where=source.at(line), mend=mend)
    key = targets[0]
    target, place = Target.OP if key == _OPS else Target(key), where(targets[0])
    for pattern in table[key] if key == _OPS else [table[key]]:
        if target is Target.OP and not preset:
            _check_op(pattern, place)
        yield Rule(
            target=target,
            pattern=pattern,
            category=Category(table["category"]),
            reason=" ".join(table["reason"].split()),
            dtype=table.get("dtype"),
            device=table.get("device"),
            mode=table.get("mode"),
            source=f"{Path(source.shown).name}:{line}",
            location=table.get("location", ""),
        )


def _check_ops(value: Any, where: str) -> None:
    named = isinstance(value, list) and all(isinstance(op, str) and op.strip() for op in value)
    if not named or not value:
        mend = 'Write a list of operators, such as ["aten.linear", "aten.mm"].'
        raise UsageError("`ops` is not a list of operators", where=where, mend=mend)


def _check_op(pattern: str, where: str) -> None:
    if is_known_op(pattern):
        return
    known = _op_names()
    op = ".".join(pattern.split(".")[:2])
    if op in known:
        raise unknown("overload", pattern, [n for n in known if n.startswith(f"{op}.")], where)
    word = pattern.replace("::", ".").removeprefix("torch.ops.")
    if not word.startswith(("aten.", "operator.")):
        word = f"aten.{word.rpartition('.')[2]}"
    raise unknown("op", pattern, known, where, near=word)


def is_known_op(pattern: str) -> bool:
    """Whether an operator, or glob of them, is in this PyTorch, or may be in another library."""
    # Other libraries register their ops when the model is imported: not yet.
    if pattern.partition(".")[0] not in ("aten", "operator", "torch", pattern) or pattern == "*":
        return True
    known = _op_names()
    return pattern in known or (is_glob(pattern) and any(fnmatchcase(n, pattern) for n in known))


@lru_cache(maxsize=1)
def _op_names() -> frozenset[str]:
    """Every ATen op, with and without overload, and Python's operators, which graphs hold too."""
    import torch

    names = {f"operator.{name}" for name in operator.__all__}
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::"):
            base, _, overload = full.removeprefix("aten::").partition(".")
            names |= {f"aten.{base}", f"aten.{base}.{overload or 'default'}"}
    return frozenset(names)


def _known_keys(
    kind: str, table: dict[str, Any], known: Collection[str], where: Callable[[str], str]
) -> None:
    for key in table:
        if key not in known:
            raise unknown(kind, key, known, where(key))


def _choice(key: str, value: Any, where: str) -> str:
    if value not in _CHOICES[key]:
        raise unknown(key, str(value), _CHOICES[key], where)
    return str(value)
