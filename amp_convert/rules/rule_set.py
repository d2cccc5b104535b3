"""Rules files -> Rules: which precision category an op, a module, a layer or a node gets, and why.

How rules are found and matched:

1. A name that is a preset is that preset; anything that looks like a path, or exists, is a file.
2. A file's `extends` are read before it, each file once; files named later come later.
3. Overrides (`node`, `layer`, `module`) and op rules are looked up apart. Among the rules that
   match, those of the last file win, whatever they are. Within a file an exact op beats one that is
   another name for it (`clip` for `clamp`: see `op_facts`), and that beats a glob; then the last
   one wins.
4. The last file that states a `painting` decides it; the last that names a guard or a rewrite sets
   it.

Files are data: TOML checked against a schema, never executed, never followed to code.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import Any

from amp_convert.core.errors import UsageError
from amp_convert.core.files.reading import LARGEST_TOML, read_file
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import canonical, short_name, with_overload
from amp_convert.rules.rule import Category, GuardLimits, Painting, Rewrites, Rule, Target
from amp_convert.rules.rule_file import RuleFile, is_glob, parse_rule_file, unknown

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


_LONGEST_CHAIN = 50


@dataclass(frozen=True)
class Place:
    """What a rule may be limited to: low dtype, device type and mode ("eval" or "train")."""

    dtype: str
    device: str
    mode: Mode

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

    @property
    def uses_probes(self) -> bool:
        """Whether anything asks how large values become on other inputs (see `range_probes`)."""
        scales = self.rewrites.scale_scores or self.rewrites.rescale_layers
        return self.guards.probe_headroom is not False or scales

    @property
    def uses_trials(self) -> bool:
        """Whether anything asks how far rounding a value throws others off (see
        `rounding_trials`)."""
        guards, rewrites = self.guards, self.rewrites
        tried = (
            guards.rounding_growth, guards.output_error, guards.choice_error, guards.increment_loss
        )  # fmt: skip
        asked = any(limit is not False for limit in tried)
        return asked or rewrites.scale_scores or rewrites.rescale_layers

    def overrides(self, *, node: str, layer: str, modules: Sequence[str]) -> list[int]:
        """Indices of the node, layer and module rules for a node, whatever they are limited to.

        `node` is its stable identity, `layer` its module path ("" at top level), `modules` the
        class paths of the modules around it, innermost first.
        """
        own = {*modules, *(path.rpartition(".")[2] for path in modules)}
        return [
            *(index for index, pattern in self._layers if _in_layer(pattern, layer)),
            *(index for index, paths in self._modules if not paths.isdisjoint(own)),
            *self._nodes.get(node, ()),
        ]

    def match_override(
        self, place: Place, *, node: str, layer: str, modules: Sequence[str]
    ) -> Rule | None:
        """The last of the `overrides` of a node that holds at `place`."""
        return self._last(self.overrides(node=node, layer=layer, modules=modules), place)

    def match_op(self, place: Place, op: str) -> Rule | None:
        """The op rule for `op`, a full name such as "aten.pow.Tensor_Scalar".

        A pattern without overload ("aten.pow") covers every overload.
        """
        folded = (with_overload(op), canonical(op))
        exact = [self._ops.get(name, ()) for name in (op, short_name(op))]
        exact += [self._folded_ops.get(name, ()) for name in folded]
        found = {i: -step for step, indices in reversed([*enumerate(exact)]) for i in indices}
        names = {op, short_name(op), *folded}
        for index in self._op_globs:
            if any(fnmatchcase(name, self.rules[index].pattern) for name in names):
                found[index] = -len(exact)
        order = sorted(found, key=lambda i: (self.rules[i].rank, found[i], i), reverse=True)
        return next((r for r in map(self.rules.__getitem__, order) if place.is_covered_by(r)), None)

    def _last(self, indices: Iterable[int], place: Place) -> Rule | None:
        for index in sorted(indices, reverse=True):
            if place.is_covered_by(self.rules[index]):
                return self.rules[index]
        return None

    # An edited plan pins thousands of nodes: those must not be scanned for every node.

    @cached_property
    def _nodes(self) -> dict[str, list[int]]:
        return self._by(lambda rule: rule.pattern, Target.NODE)

    @cached_property
    def _ops(self) -> dict[str, list[int]]:
        return self._by(lambda rule: rule.pattern, Target.OP)

    @cached_property
    def _folded_ops(self) -> dict[str, list[int]]:
        return self._by(lambda rule: with_overload(rule.pattern), Target.OP)

    def _by(self, key: Callable[[Rule], str], target: Target) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, rule in enumerate(self.rules):
            if rule.target is target and not (target is Target.OP and is_glob(rule.pattern)):
                found.setdefault(key(rule), []).append(index)
        return found

    @cached_property
    def _op_globs(self) -> tuple[int, ...]:
        rules = enumerate(self.rules)
        return tuple(i for i, r in rules if r.target is Target.OP and is_glob(r.pattern))

    @cached_property
    def _layers(self) -> tuple[tuple[int, str], ...]:
        return tuple((i, r.pattern) for i, r in enumerate(self.rules) if r.target is Target.LAYER)

    @cached_property
    def _modules(self) -> tuple[tuple[int, frozenset[str]], ...]:
        return tuple(
            (index, _class_paths(rule.pattern))
            for index, rule in enumerate(self.rules)
            if rule.target is Target.MODULE
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
        rules=tuple(
            replace(rule, rank=rank)
            for rank, file in enumerate(loaded.values())
            for rule in file.rules
        ),
        guards=guards,
        files=tuple(file.shown for file in loaded.values()),
        rewrites=rewrites,
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
    )


def preset_names() -> list[str]:
    """Names of the presets shipped with amp-convert, sorted."""
    return sorted(_presets())


def _in_layer(pattern: str, layer: str) -> bool:
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*")


def _class_paths(pattern: str) -> frozenset[str]:
    """What a `module` rule is compared with: its pattern and, where that is a public name such as
    "torch.nn.LayerNorm", the path of the class itself. Only modules that are imported already are
    looked into: a rules file is data, and imports nothing."""
    parts = pattern.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is None:
            continue
        package = found
        for part in parts[cut:]:
            found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
        if isinstance(found, type):
            return frozenset({pattern, f"{found.__module__}.{found.__qualname__}"})
        if cut == len(parts) - 1 and hasattr(package, "__getattr__"):
            return frozenset({pattern, *_inside(package.__name__, parts[-1])})
    return frozenset({pattern})


def _inside(package: str, name: str) -> Iterator[str]:
    """The classes of that name in imported modules of a package that gives its names lazily: the
    one that it means is among them."""
    for path, module in list(sys.modules.items()):
        found = vars(module).get(name) if path.startswith(f"{package}.") else None
        if isinstance(found, type) and found.__module__ == path:
            yield f"{path}.{found.__qualname__}"


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
