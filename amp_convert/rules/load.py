"""Names of presets and files -> `Rules`.

A name that is a preset is that preset; anything that looks like a path, or exists, is a file. A
file's `extends` are read before it, each file once; files named later come later. The last file
that states a `painting` decides it; the last that names a guard or a rewrite sets it.

Files are data: TOML checked against a schema, never executed, never followed to code.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path

from amp_convert.core.errors import UsageError
from amp_convert.core.files.reading import LARGEST_TOML, read_file
from amp_convert.rules.rule import GuardLimits, Painting, Rewrites
from amp_convert.rules.rule_file import RuleFile, parse_rule_file, unknown
from amp_convert.rules.rule_set import Rules

_LONGEST_CHAIN = 50


def load_rules(names: Sequence[str]) -> Rules:
    """Read presets and files, in this order, into one `Rules`.

    Raises UsageError naming file, line and the nearest valid word for anything that is not a
    preset, not a readable file, not TOML or not in the schema.
    """
    if not names:
        raise UsageError("no rules were given", mend=f"Name one of: {', '.join(preset_names())}.")
    loaded: dict[str, RuleFile] = {}
    for name in names:
        _load(_find(name, Path(), where=""), (), loaded)
    guards, rewrites = GuardLimits(), Rewrites()
    for file in loaded.values():
        guards, rewrites = replace(guards, **file.guards), replace(rewrites, **file.rewrites)
    return Rules(
        name=", ".join(names),
        painting=[Painting.GRAPPLER, *(f.painting for f in loaded.values() if f.painting)][-1],
        rules=tuple(
            replace(rule, rank=rank)
            for rank, file in enumerate(loaded.values())
            for rule in file.rules
        ),
        guards=guards,
        files=tuple(file.shown for file in loaded.values()),
        rewrites=rewrites,
        made_for=[None, *(f.made_for for f in loaded.values())][-1],
    )


def rules_of_text(text: str, shown: str) -> Rules:
    """The rules of one text that extends nothing, such as a plan; `shown` is what errors call it.
    Raises UsageError as `load_rules` does."""
    file = parse_rule_file(text, shown)
    return Rules(
        name=shown,
        painting=file.painting or Painting.GRAPPLER,
        rules=file.rules,
        guards=replace(GuardLimits(), **file.guards),
        files=(shown,),
        rewrites=replace(Rewrites(), **file.rewrites),
        made_for=file.made_for,
    )


def preset_names() -> list[str]:
    """Names of the presets shipped with amp-convert, sorted."""
    return sorted(_presets())


@lru_cache(maxsize=1)
def _presets() -> dict[str, Traversable]:
    """In a wheel the presets lie inside the package, in a checkout beside it."""
    packaged = importlib.resources.files("amp_convert") / "rules" / "presets"
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "rules"
    found = folder.iterdir() if folder.is_dir() else ()
    return {f.name.removesuffix(".toml"): f for f in found if f.name.endswith(".toml")}


@dataclass(frozen=True)
class _FilePlace:
    """Where a rules file lies. `key` tells whether two places are the same."""

    file: Traversable
    shown: str
    key: str
    folder: Path
    preset: bool


def _find(name: str, folder: Path, where: str) -> _FilePlace:
    preset = _presets().get(name)
    if preset is not None:
        return _FilePlace(preset, preset.name, f"preset {name}", Path(), preset=True)
    path = folder / name
    is_path = "." in name or "/" in name or os.sep in name or os.path.exists(path)
    if not is_path or "\0" in name:
        raise unknown("preset", name, preset_names(), where)
    return _FilePlace(path, str(path), os.path.realpath(path), path.parent, preset=False)


def _load(place: _FilePlace, below: tuple[_FilePlace, ...], loaded: dict[str, RuleFile]) -> None:
    """Add a file after all that it extends. `below` are the files that led here."""
    # Named again, a file moves to the end, so that it has the last word.
    if place.key in loaded:
        loaded[place.key] = loaded.pop(place.key)
        return
    file = parse_rule_file(_text(place, below), place.shown, preset=place.preset)
    chain = (*below, place)
    if len(chain) > _LONGEST_CHAIN:
        what = f"more than {_LONGEST_CHAIN} rules files extend one another in a row"
        raise UsageError(what, where=below[-1].shown, mend="Write them as fewer files.")
    for name in file.extends:
        parent = _find(name, place.folder, file.extends_at)
        if parent.key in [p.key for p in chain]:
            circle = " -> ".join(p.shown for p in (*chain, parent))
            raise UsageError(
                f"rules files extend each other in a circle: {circle}",
                where=file.extends_at,
                mend="Remove one of these `extends`.",
            )
        if parent.key not in loaded:
            _load(parent, chain, loaded)
    loaded[place.key] = file


def _text(place: _FilePlace, below: tuple[_FilePlace, ...]) -> str:
    try:
        file = place.file
        data = read_file(file, LARGEST_TOML) if isinstance(file, Path) else file.read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        why = str(error)
        if isinstance(error, OSError):
            why = str(error.strerror).lower()
        elif isinstance(error, UnicodeDecodeError):
            why = "not UTF-8 text"
        raise UsageError(
            f"cannot read rules file {place.shown!r}: {why}",
            where=below[-1].shown if below else "",
            mend=f"Name a TOML file or one of the presets: {', '.join(preset_names())}.",
        ) from error
