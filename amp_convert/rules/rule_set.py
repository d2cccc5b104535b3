"""`Rules`: which precision category an op, a module, a layer or a node gets, and why.

Overrides (`node`, `layer`, `module`) and op rules are looked up apart. Among the rules that match,
those of the last file win, whatever they are. Within a file an exact op beats one that is another
name for it (`clip` for `clamp`: see `op_facts`), and that beats a glob; then the last one wins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from types import ModuleType
from typing import Any

from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import canonical, short_name, with_overload
from amp_convert.rules.rule import (
    Category,
    GuardLimits,
    MadeFor,
    Painting,
    Rewrites,
    Rule,
    Target,
)
from amp_convert.rules.rule_file import is_glob

__all__ = [
    "Category",
    "GuardLimits",
    "MadeFor",
    "Painting",
    "Place",
    "Rewrites",
    "Rule",
    "Rules",
    "Target",
]


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
    """All rules of a run in file order; the last match wins. `name` joins the names asked for.
    `made_for` is there where the last file is a saved plan."""

    name: str
    painting: Painting
    rules: tuple[Rule, ...]
    guards: GuardLimits
    files: tuple[str, ...]
    rewrites: Rewrites = field(default_factory=Rewrites)
    made_for: MadeFor | None = None

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

    def op_categories(self, place: Place) -> dict[str, Category]:
        """The category of each operator, or glob of operators, that a rule names, at `place`."""
        found = {}
        for rule in self.rules:
            if rule.target is Target.OP and rule.pattern not in found and place.is_covered_by(rule):
                found[rule.pattern] = self.match_op(place, rule.pattern).category  # type: ignore[union-attr]
        return found

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


def ask_for_fp32(files: Sequence[str]) -> bool:
    """Whether these rules files are the preset that asks for FP32 throughout."""
    return [file.removesuffix(".toml") for file in files] == ["fp32"]


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
