"""What calibration knows of the values of one captured graph.

Calibration runs the eval graph. Where the train graph has more or fewer of an operator in a layer,
nobody knows which is which: then the worst of all of them holds for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import fx

from amp_convert.capture import Region
from amp_convert.export import NodeInfo
from amp_convert.profile import Range, RangeStats, input_key
from amp_convert.rounding import Growth
from amp_convert.runner import Source

_T = TypeVar("_T")


class Evidence:
    """Ranges and growths by FX node of the graph of `region` in `mode`; growths for `dtype`."""

    def __init__(self, region: Region, mode: str, stats: RangeStats, dtype: torch.dtype) -> None:
        captured = region.graphs[mode]
        self.batches = stats.batches
        self._ranges, self._growths = stats.ranges, stats.growths.get(dtype, {})
        self._infos = captured.nodes
        self._groups = _by_layer_and_op(captured.nodes.values())
        self._eval_groups = _by_layer_and_op(region.graphs["eval"].nodes.values())
        self._given: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        paths = iter(captured.signature.user_inputs)
        placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, captured.signature.inputs, strict=True):
            if spec.source is Source.USER:
                self._given[node.name] = input_key(region, next(paths).path)
            else:
                self._given[node.name] = self._weights[node.name] = region.qualified(spec.target)

    def weight(self, node: fx.Node) -> str:
        """The name of the parameter, buffer or constant that a value is; "" for any other."""
        return self._weights.get(node.name, "")

    def range(self, node: fx.Node) -> Range | None:
        """What calibration saw of a node's result, or of a tensor that the graph is given."""
        if node.name in self._given:
            return self._ranges.get(self._given[node.name])
        return self._known(node, self._ranges, Range.merged)

    def growth(self, node: fx.Node) -> Growth | None:
        """What the trials of calibration showed of a node."""
        return self._known(node, self._growths, Growth.merged)

    def text(self, node: fx.Node) -> str:
        """The range of a node's result as a report says it."""
        if not self.batches:
            return "no evidence: nothing was measured"
        seen = self.range(node)
        return seen.text(self.batches) if seen is not None else "not measured"

    def _known(
        self, node: fx.Node, measured: Mapping[str, _T], merged: Callable[[_T, _T], _T]
    ) -> _T | None:
        info = self._infos.get(node.name)
        if info is None:
            return None
        group = (info.layer, info.short_op)
        if len(self._groups[group]) == len(self._eval_groups.get(group, ())):
            return measured.get(info.identity)
        seen = [measured.get(name) for name in self._eval_groups.get(group, ())]
        known = [found for found in seen if found is not None]
        return functools.reduce(merged, known) if known else None


def _by_layer_and_op(infos: Iterable[NodeInfo]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for info in infos:
        groups.setdefault((info.layer, info.short_op), []).append(info.identity)
    return groups
