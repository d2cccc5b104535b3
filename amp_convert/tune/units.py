"""What is chosen together, what it adds to the error, and what FP32 costs there.

A unit is a layer's nodes that are low and have an error or multiply-adds of their own, or a rule
that allows them. Layers whose products read one
and the same value, as those of query, key and value do, are one unit: kept apart, each choice would
need a cast of its own. With `blocks`, so are all layers of one numbered block.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from amp_convert.attribute.results import Budget, root_of_squares
from amp_convert.capture.captured import Value
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import HEAVY, facts_of
from amp_convert.plan.plan import Decision
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.rule import Category
from amp_convert.tune.results import Border, Cost, Unit
from amp_convert.validate.inference.results import LayerTime

_BLOCK = re.compile(r"^(.*?\.?\d+)(\.|$)")
_CAST_BYTES = 6
"""A cast reads four bytes and writes two, or the other way round."""


def make_units(
    converted: ConvertedModel,
    budget: Budget,
    times: tuple[LayerTime, ...],
    cost: Cost,
    *,
    blocks: bool,
) -> tuple[tuple[Unit, ...], tuple[Border, ...]]:
    """The units of a converted model, in the order in which they run, and the borders between
    them. `times` are those of its layers, for measured prices."""
    return _Maker(converted, budget, blocks=blocks).make(times, cost)


class _Maker:
    def __init__(self, converted: ConvertedModel, budget: Budget, *, blocks: bool) -> None:
        region = converted.captured.regions[0]
        self._graph: fx.Graph = region.graphs[Mode.EVAL].graph_module.graph
        self._values = region.traces[Mode.EVAL].values
        self._device = converted.captured.device
        self._decisions: Mapping[str, Decision] = converted.rewritten[""][Mode.EVAL].decisions
        self._errors = {
            node.node: node.rel_l2 if node.trial_rel_l2 is None else node.trial_rel_l2
            for node in budget.nodes
        }
        low = [d for d in self._decisions.values() if d.low]
        self._chosen = [
            d for d in low if self._errors.get(d.node) or d.macs or d.category is Category.ALLOW
        ]
        self._about = {d.node for d in self._chosen}
        casts = {node.node: node.cast_rel_l2 or 0.0 for node in budget.nodes}
        self._casts = {name: casts.get(d.node, 0.0) for name, d in self._decisions.items()}
        self._unit_of_layer = self._units_of_layers(blocks)

    def make(
        self, times: tuple[LayerTime, ...], cost: Cost
    ) -> tuple[tuple[Unit, ...], tuple[Border, ...]]:
        groups: dict[str, list[Decision]] = defaultdict(list)
        for decision in self._chosen:
            groups[self._unit_of_layer[decision.layer]].append(decision)
        total = sum(d.macs for d in self._decisions.values()) or 1
        units = [
            Unit(
                name=name,
                nodes=tuple(d.node for d in members),
                error=root_of_squares(self._errors.get(d.node, 0.0) for d in members),
                price=sum(d.macs for d in members) / total,
                macs=sum(d.macs for d in members),
            )
            for name, members in groups.items()
        ]
        edges = self._edges()
        size = sum(count for count, _ in edges.values()) or 1
        per_byte = 0.25 / size  # all casts together cost as much as a quarter of the products
        if cost is Cost.MEASURED:
            units = self._with_times(units, times)
            per_byte = _milliseconds_a_byte(self._device)
        borders = [
            Border(source, reader, count * per_byte, error)
            for (source, reader), (count, error) in edges.items()
        ]
        return tuple(units), tuple(borders)

    def _with_times(self, units: list[Unit], times: tuple[LayerTime, ...]) -> list[Unit]:
        """The units with measured prices."""
        more: Counter[str] = Counter()
        for row in times:
            if row.layer in self._unit_of_layer:
                more[self._unit_of_layer[row.layer]] += row.fp32 - row.frozen  # type: ignore[assignment]
        return [replace(unit, price=float(more[unit.name])) for unit in units]

    def _units_of_layers(self, blocks: bool) -> dict[str, str]:
        """The unit that each layer is in."""
        layers = list(dict.fromkeys(d.layer for d in self._chosen))
        found = {layer: _block(layer) if blocks else layer for layer in layers}
        readers: dict[fx.Node, list[str]] = defaultdict(list)
        for node in self._graph.nodes:
            decision = self._decisions.get(node.name)
            if decision is None or not decision.low or not facts_of(decision.op).is_a(*HEAVY):
                continue
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node):
                readers[source].append(decision.layer)
        for units in readers.values():
            joined = {found[layer] for layer in units}
            first = min(joined, key=list(found.values()).index)
            found = {layer: first if unit in joined else unit for layer, unit in found.items()}
        return found

    def _edges(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Of each unit and one that reads its results: the bytes of the casts between them, and
        what rounding these values would add to the error. Each value counts once a pair."""
        sources: dict[fx.Node, set[str]] = {}
        read: dict[tuple[str, str], set[fx.Node]] = defaultdict(set)
        for node in self._graph.nodes:
            handed = {unit for n in node.all_input_nodes for unit in sources.get(n, ())}
            mine = self._unit(node)
            sources[node] = handed if mine is None else {mine}
            if mine is not None:
                for value in node.all_input_nodes:
                    for source in sources.get(value, set()) - {mine}:
                        read[source, mine].add(value)
        return {
            pair: (
                sum(map(self._bytes, values)),
                root_of_squares(self._casts.get(value.name, 0.0) for value in values),
            )
            for pair, values in read.items()
        }

    def _bytes(self, node: fx.Node) -> int:
        value = self._values.get(node.name)
        return _CAST_BYTES * math.prod(value.shape) if isinstance(value, Value) else 0

    def _unit(self, node: fx.Node) -> str | None:
        """The unit of a node that is chosen about; the others go with what is around them."""
        decision = self._decisions.get(node.name)
        if decision is None or decision.node not in self._about:
            return None
        return self._unit_of_layer[decision.layer]


def _block(layer: str) -> str:
    """The first numbered part of a layer's name: "encoder.layer.0.attention" is in
    "encoder.layer.0"."""
    found = _BLOCK.match(layer)
    return found[1] if found else layer


def _milliseconds_a_byte(device: torch.device) -> float:
    """What a cast of a large tensor takes, for each byte that it reads or writes."""
    wide = torch.ones(2**22, device=device)
    taken = [devices.milliseconds(wide.half, device) for _ in range(5)]
    return sorted(taken)[2] / (_CAST_BYTES * wide.numel())
