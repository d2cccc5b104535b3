"""Rules files -> Rules: which precision category an op, a module, a layer or a node gets, and why.

How rules are found and matched:

1. A name that is a preset is that preset; anything that looks like a path, or exists, is a file.
2. A file's `extends` are read before it, each file once; files named later come later.
3. A rule has one target. Overrides (`node`, `layer`, `module`) and op rules are looked up apart;
   among the rules that match, the last one in that order wins.
4. The last file that states a `painting` decides it; the last that names a guard or a rewrite sets
   it.

Files are data: TOML checked against a schema, never executed, never followed to code.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path

from amp_convert.core.errors import UsageError
from amp_convert.rules.rule_file import (
    Category,
    GuardLimits,
    Painting,
    Rewrites,
    Rule,
    RuleFile,
    Target,
    is_glob,
    parse_rule_file,
    unknown,
)

__all__ = [
    "Category",
    "GuardLimits",
    "Painting",
    "Place",
    "Rewrites",
    "Rule",
    "Rules",
    "Target",
    "load_rules",
    "preset_names",
]


@dataclass(frozen=True)
class Place:
    """What a rule may be limited to: low dtype, device type and mode ("eval" or "train")."""

    dtype: str
    device: str
    mode: str

    def is_covered_by(self, rule: Rule) -> bool:
        """Whether a rule holds here."""
        limits = ((rule.dtype, self.dtype), (rule.device, self.device), (rule.mode, self.mode))
        return all(wanted in (None, have) for wanted, have in limits)


@dataclass(frozen=True)
class Rules:
    """All rules of a run in file order; the last match wins. `name` joins the names asked for."""

    name: str
    painting: Painting
    rules: tuple[Rule, ...]
    guards: GuardLimits
    files: tuple[str, ...]
    rewrites: Rewrites = field(default_factory=Rewrites)

    def overrides(self, *, node: str, layer: str, modules: Sequence[str]) -> list[int]:
        """Indices of the node, layer and module rules for a node, whatever they are limited to.

        `node` is its stable identity, `layer` its module path ("" at top level), `modules` the
        class paths of the modules around it, innermost first.
        """
        found = [
            index
            for index, rule in self._patterns
            if (rule.target is Target.LAYER and _in_layer(rule.pattern, layer))
            or (rule.target is Target.MODULE and any(_is_class(rule.pattern, m) for m in modules))
        ]
        return [*found, *self._exact.get((Target.NODE, node), ())]

    def match_override(
        self, place: Place, *, node: str, layer: str, modules: Sequence[str]
    ) -> Rule | None:
        """The last of the `overrides` of a node that holds at `place`."""
        return self._last(self.overrides(node=node, layer=layer, modules=modules), place)

    def match_op(self, place: Place, op: str) -> Rule | None:
        """The last op rule for `op`, a full name such as "aten.pow.Tensor_Scalar".

        A pattern without overload ("aten.pow") covers every overload.
        """
        names = {op, ".".join(op.split(".")[:2])}
        found = [
            index
            for index, rule in self._patterns
            if rule.target is Target.OP and any(fnmatchcase(n, rule.pattern) for n in names)
        ]
        exact = (i for name in names for i in self._exact.get((Target.OP, name), ()))
        return self._last([*found, *exact], place)

    def _last(self, indices: Iterable[int], place: Place) -> Rule | None:
        for index in sorted(indices, reverse=True):
            if place.is_covered_by(self.rules[index]):
                return self.rules[index]
        return None

    @cached_property
    def _exact(self) -> dict[tuple[Target, str], list[int]]:
        """Rules found by equality. An edited plan pins thousands of nodes: those must not be
        scanned for every node."""
        found: dict[tuple[Target, str], list[int]] = {}
        for index, rule in enumerate(self.rules):
            found.setdefault((rule.target, rule.pattern), []).append(index)
        return found

    @cached_property
    def _patterns(self) -> tuple[tuple[int, Rule], ...]:
        return tuple(
            (index, rule)
            for index, rule in enumerate(self.rules)
            if rule.target in (Target.LAYER, Target.MODULE)
            or (rule.target is Target.OP and is_glob(rule.pattern))
        )


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
        rules=tuple(rule for file in loaded.values() for rule in file.rules),
        guards=guards,
        files=tuple(file.shown for file in loaded.values()),
        rewrites=rewrites,
    )


def preset_names() -> list[str]:
    """Names of the presets shipped with amp-convert, sorted."""
    return sorted(_presets())


def _in_layer(pattern: str, layer: str) -> bool:
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*")


def _is_class(pattern: str, path: str) -> bool:
    """A public alias ("torch.nn.LayerNorm") shares package and class name with the full path."""
    if "." not in pattern:
        return path.rpartition(".")[2] == pattern
    ends = [(p.partition(".")[0], p.rpartition(".")[2]) for p in (pattern, path)]
    return ends[0] == ends[1]


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
    is_path = name.endswith(".toml") or "/" in name or os.sep in name or os.path.exists(path)
    if not is_path or "\0" in name:
        raise unknown("preset", name, preset_names(), where)
    return _FilePlace(path, str(path), os.path.realpath(path), path.parent, preset=False)


def _load(place: _FilePlace, below: tuple[_FilePlace, ...], loaded: dict[str, RuleFile]) -> None:
    """Add a file after all that it extends. `below` are the files that led here."""
    file = parse_rule_file(_text(place, below), place.shown, preset=place.preset)
    chain = (*below, place)
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
    # Named again, a file moves to the end, so that it has the last word.
    loaded.pop(place.key, None)
    loaded[place.key] = file


def _text(place: _FilePlace, below: tuple[_FilePlace, ...]) -> str:
    try:
        return place.file.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        why = str(error.strerror).lower() if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"cannot read rules file {place.shown!r}: {why}",
            where=below[-1].shown if below else "",
            mend=f"Name a TOML file or one of the presets: {', '.join(preset_names())}.",
        ) from error
