"""What calibration knows of the values of one captured graph.

Calibration runs the eval graph. Where the train graph has more or fewer of an operator in a layer,
nobody knows which is which: then the worst of all of them holds for each. Where it has a dropout of
its own, the range is that of what the dropout reads and scales up.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import fx

from amp_convert.capture.captured import Region
from amp_convert.capture.graph_signature import Source
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import Family, facts_of, facts_of_target
from amp_convert.profile.calibrate import Range, RangeStats
from amp_convert.profile.growth import Growth

_T = TypeVar("_T")


class Evidence:
    """Ranges and growths by FX node of the graph of `region` in `mode`; growths for `dtype`."""

    def __init__(self, region: Region, mode: Mode, stats: RangeStats, dtype: torch.dtype) -> None:
        captured = region.graphs[mode]
        self.batches = stats.batches
        self._ranges, self._growths = stats.ranges, stats.growths.get(dtype, {})
        self._infos = captured.nodes
        self._groups = _by_layer_and_op(captured.nodes.values())
        self._eval_groups = _by_layer_and_op(region.graphs[Mode.EVAL].nodes.values())
        self._given: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        placeholders = captured.signature.placeholders(captured.graph_module.graph)
        for given, node in captured.signature.users(placeholders):
            self._given[node.name] = region.input_key(given.path)
        for node, spec in placeholders.items():
            if spec.source is not Source.USER:
                self._given[node.name] = self._weights[node.name] = region.qualified(spec.target)

    def weight(self, node: fx.Node) -> str:
        """The name of the parameter, buffer or constant that a value is; "" for any other."""
        return self._weights.get(node.name, "")

    def range(self, node: fx.Node) -> Range | None:
        """What calibration saw of a node's result, or of a tensor that the graph is given."""
        if node.name in self._given:
            return self._ranges.get(self._given[node.name])
        found = self._known(node, self._ranges, Range.merged)
        return found if found is not None else self._behind_dropout(node)

    def growth(self, node: fx.Node) -> Growth | None:
        """What the trials of calibration showed of a node."""
        return self._known(node, self._growths, Growth.merged)

    def text(self, node: fx.Node) -> str:
        """The range of a node's result as a report says it."""
        if not self.batches:
            return "no evidence: nothing was measured"
        seen = self.range(node)
        return seen.text(self.batches) if seen is not None else "not measured"

    def _behind_dropout(self, node: fx.Node) -> Range | None:
        if node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        if not facts_of_target(node.target).is_a(Family.DROPOUT):
            return None
        source, share = node.args[:2]
        assert isinstance(source, fx.Node)
        seen = self.range(source)
        if seen is None or not isinstance(share, float) or share >= 1:
            return seen
        return seen.scaled(1 / (1 - share))

    def _known(
        self, node: fx.Node, measured: Mapping[str, _T], merged: Callable[[_T, _T], _T]
    ) -> _T | None:
        info = self._infos.get(node.name)
        if info is None:
            return None
        group = _group(info)
        names, eval_names = self._groups[group], self._eval_groups.get(group, [])
        if len(names) == len(eval_names):
            return measured.get(eval_names[names.index(info.identity)])
        seen = [measured.get(name) for name in eval_names]
        known = [found for found in seen if found is not None]
        return functools.reduce(merged, known) if known else None


def _by_layer_and_op(infos: Iterable[NodeInfo]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for info in infos:
        groups.setdefault(_group(info), []).append(info.identity)
    return groups


def _group(info: NodeInfo) -> tuple[str, str]:
    """A node's layer and what it computes: an operator may go by another name in each mode."""
    return info.layer, facts_of(info.op).name
