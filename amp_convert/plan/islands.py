"""FP32 islands: the regions that stay FP32 among low nodes, and what they cost.

Nodes of FP32 results that feed one another are one region. Where it reads a low value, or a low
node reads it, a cast is made, once for each value: these casts, and the wider results, are what the
region costs. A region without a cast of an activation, such as what is computed from weights alone,
costs nothing at a call and is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx

from amp_convert.capture.captured import Captured, Region, Value
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import FULL
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.plan.costs import Island
from amp_convert.plan.dtype_flow import tensor_arguments
from amp_convert.plan.plan import Decision, DecisionKind

_WEIGHT = (
    DecisionKind.GUARD, DecisionKind.OVERRIDE, DecisionKind.EXPLICIT, DecisionKind.REFUSED,
    DecisionKind.UNKNOWN, DecisionKind.RULE,
)  # fmt: skip
"""What says most about why a region is FP32, first."""


def islands(
    captured: Captured, decisions: Iterable[Decision], low: torch.dtype
) -> tuple[Island, ...]:
    """The islands of the eval plan that these are the decisions of, the dearest first."""
    by_node = {decision.node: decision for decision in decisions}
    found = [
        island
        for region, mode in captured.graphs()
        if mode is Mode.EVAL
        for island in _Finder(region, by_node, low).found()
    ]
    return tuple(sorted(found, key=lambda each: -(each.cast_bytes + each.wider_bytes)))


class _Finder:
    """The islands of one graph. A region is known by one of its nodes (union-find)."""

    def __init__(self, region: Region, by_node: Mapping[str, Decision], low: torch.dtype) -> None:
        graph = region.graphs[Mode.EVAL]
        self._low, self._values = low, region.traces[Mode.EVAL].values
        calls = [n for n in graph.graph_module.graph.nodes if n.op == "call_function"]
        self._decisions = {n: by_node[graph.nodes[n.name].identity] for n in calls}
        self._parent: dict[fx.Node, fx.Node] = {
            n: n for n, d in self._decisions.items() if d.dtype == FULL and self._is_fp32(n)
        }

    def found(self) -> Iterator[Island]:
        """Each region that has a cast at its borders, in the order of the graph."""
        borders: dict[fx.Node, list[fx.Node]] = {}
        for value, member in self._casts():
            borders.setdefault(self._root(member), []).append(value)
        regions: dict[fx.Node, list[fx.Node]] = {}
        for node in self._parent:
            regions.setdefault(self._root(node), []).append(node)
        for root, members in regions.items():
            if root in borders:
                decisions = [self._decisions[n] for n in members]
                moved = sum(map(self._elements, borders[root]))
                held = sum(map(self._elements, filter(_allocates, members)))
                yield _island(
                    [d for d in decisions if d.decided] or decisions,
                    casts=len(borders[root]),
                    cast_bytes=moved * (torch.float32.itemsize + self._low.itemsize),
                    wider_bytes=held * (torch.float32.itemsize - self._low.itemsize),
                )

    def _casts(self) -> list[tuple[fx.Node, fx.Node]]:
        """The values that are cast on their way into a region or out of it, each with a node of
        the region. On the way, nodes that feed one another become one region."""
        casts: dict[tuple[fx.Node, str], fx.Node] = {}
        for node, decision in self._decisions.items():
            arguments = tensor_arguments(node, self._values)
            for (_, producer), planned in zip(arguments, decision.inputs, strict=True):
                if planned.dtype is None:
                    if node in self._parent and producer in self._parent:
                        self._parent[self._root(node)] = self._root(producer)
                elif planned.dtype != FULL and producer in self._parent:
                    casts[producer, planned.dtype] = producer
                elif planned.dtype == FULL and node in self._parent and producer in self._decisions:
                    casts[producer, planned.dtype] = node
        return [(value, member) for (value, _), member in casts.items()]

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _is_fp32(self, node: fx.Node) -> bool:
        value = self._values.get(node.name)
        return isinstance(value, Value) and value.dtype == torch.float32

    def _elements(self, node: fx.Node) -> int:
        return torch.Size(self._values[node.name].shape).numel()


def _island(
    decisions: Sequence[Decision], *, casts: int, cast_bytes: int, wider_bytes: int
) -> Island:
    def weight(decision: Decision) -> int:
        return _WEIGHT.index(decision.kind) if decision.kind in _WEIGHT else len(_WEIGHT)

    keeper = min(decisions, key=weight)
    return Island(
        layer=keeper.layer,
        op=keeper.op,
        reason=keeper.reason,
        evidence=keeper.evidence,
        ops=tuple(Counter(decision.op for decision in decisions).most_common()),
        nodes=len(decisions),
        casts=casts,
        cast_bytes=cast_bytes,
        wider_bytes=wider_bytes,
    )


def _allocates(node: fx.Node) -> bool:
    """Whether a node makes a result of its own, and no view."""
    return not facts_of_target(node.target).is_a(Family.SHAPE)
