"""Grappler's painting: from a category for every node to the set of low-precision nodes.

The algorithm of TensorFlow's `auto_mixed_precision`, on a plain directed graph of integers:

1. *Allow* nodes are low.
2. From each *deny* node, deny floods forward through *infer* nodes, and through *clear* nodes that
   lead (through clear nodes only) to an infer or deny node. Nothing floods into an allow node.
3. Infer and clear nodes that lie between two allow nodes, and were not denied, become low.
4. Low floods in both directions through clear nodes that were not denied.

Nodes outside the four categories (unknown operators, nodes that a rule pinned to FP32) stop every
flood. What is not low at the end is FP32. A border is an edge from one colour to the other.

The published chain deny, infer, clear, infer, clear, allow, infer comes out as FP32 four times, low
twice, then FP32: nothing denies the clear node before the allow node, so it turns low in step 4,
and the last infer node leads to no other allow node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from amp_convert.rules.rule_set import Category


@dataclass(frozen=True)
class Painted:
    """The low nodes; of each denied node, the deny node that reached it."""

    low: frozenset[int]
    denied: Mapping[int, int]


def paint(
    categories: Mapping[int, Category | None],
    edges: Iterable[tuple[int, int]],
    fp32: Collection[int] = (),
) -> Painted:
    """Paint the graph with these nodes and (producer, consumer) edges.

    A node with category None has no colour of its own and stops every flood. The nodes in `fp32`
    are never low, but pass a denial on as their category says.
    """
    forward: dict[int, list[int]] = {node: [] for node in categories}
    backward: dict[int, list[int]] = {node: [] for node in categories}
    for producer, consumer in edges:
        forward[producer].append(consumer)
        backward[consumer].append(producer)

    def of(*wanted: Category) -> set[int]:
        return {node for node, category in categories.items() if category in wanted}

    allow, infer, deny, clear = (of(category) for category in Category)
    leads_on = _reach(infer | deny, backward, lambda node: node in clear)
    denied = _reach(deny, forward, lambda n: n in infer or (n in clear and n in leads_on))
    free = (infer | clear) - denied.keys() - set(fp32)
    after = _reach(allow, forward, lambda node: node in free)
    between = _reach(allow, backward, lambda node: node in free and node in after)
    both = {node: [*forward[node], *backward[node]] for node in categories}
    low = _reach(between, both, lambda node: node in clear and node in free)
    return Painted(frozenset(low), denied)


def _reach(
    roots: Collection[int], edges: Mapping[int, Sequence[int]], enter: Callable[[int], bool]
) -> dict[int, int]:
    """What `roots` reach along `edges` through nodes fit to `enter`, each with its root."""
    root = {node: node for node in sorted(roots)}
    queue = deque(root)
    while queue:
        node = queue.popleft()
        for neighbour in edges[node]:
            if neighbour not in root and enter(neighbour):
                root[neighbour] = root[node]
                queue.append(neighbour)
    return root
