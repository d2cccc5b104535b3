"""Painting against TensorFlow's own results and against a naive reading of the numbered rules.

A node's category is its name: "deny1", "infer2"; anything else ("other1") has no colour of its own,
like an op in no list, or one that Grappler has to preserve.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amp_convert.plan.coloring import Painted, paint
from amp_convert.rules.rule_set import Category

Edges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Graph:
    """Nodes by name in the order of their first mention, and edges between their numbers."""

    names: tuple[str, ...]
    edges: Edges

    @classmethod
    def of(cls, text: str) -> Graph:
        """Chains such as "allow1 > clear1 > infer1", one a line."""
        chains = [[name.strip() for name in line.split(">")] for line in text.strip().splitlines()]
        names = tuple(dict.fromkeys(name for chain in chains for name in chain))
        edges = [
            (names.index(source), names.index(target))
            for chain in chains
            for source, target in itertools.pairwise(chain)
        ]
        return cls(names, tuple(edges))

    @property
    def categories(self) -> dict[int, Category | None]:
        words = [name.rstrip("0123456789") for name in self.names]
        return {n: Category(w) if w in tuple(Category) else None for n, w in enumerate(words)}

    def painted(self) -> tuple[str, dict[str, str]]:
        """The low nodes, and each denied node with the deny node that reached it."""
        result = paint(self.categories, self.edges)
        low = " ".join(name for n, name in enumerate(self.names) if n in result.low)
        return low, {self.names[n]: self.names[root] for n, root in result.denied.items()}


# --- published results ---------------------------------------------------------------------------

# Graphs of auto_mixed_precision_test.cc and the nodes that come out as DT_HALF there.
GRAPPLER = {
    "NoOp": ("deny1 > clear1 > infer1 > clear2", ""),
    "Simple": (
        "deny1 > clear1 > infer1 > clear2 > allow1 > clear3 > infer2 > clear4 > deny2 > clear5",
        "clear2 allow1 clear3",
    ),
    "BidirectionalClearChain": (
        """
        other1 > clear1 > allow1
        other1 > clear2 > clear4
        clear1 > clear3
        clear2 > clear3
        """,
        "clear1 allow1 clear2 clear4 clear3",
    ),
    # "other1" is allow1 there, "other2" is clr2 and "other3" is clr3: fetched, so left alone.
    "PreserveFetches": (
        "other1 > clear1 > infer1 > deny1 > other2 > allow2 > other3 > deny2 > clear4",
        "allow2",
    ),
    # "other1" is allow2 there, which is placed on another device.
    "PreserveCPUNodes": ("clear1 > allow1 > infer1 > other1 > clear2", "clear1 allow1"),
    "FusedBatchNorm": (
        """
        allow1 > infer1 > infer2 > infer3 > allow2
        allow1 > infer2
        infer1 > infer3
        """,
        "allow1 infer1 infer2 infer3 allow2",
    ),
    "RepeatedAndListTypeAttrs": (
        """
        allow1 > clear1 > infer1 > allow2
        allow1 > clear1
        clear1 > infer1
        """,
        "allow1 clear1 infer1 allow2",
    ),
    "BatchMatMul": ("other1 > allow1 > other2", "allow1"),
    "TestSimpleUnaryInferOp": (
        "other1 > allow1 > infer1 > allow2 > other2",
        "allow1 infer1 allow2",
    ),
    "MKL Simple": (
        "deny1 > clear1 > infer1 > clear2 > allow1 > clear3 > deny2 > clear4 > deny3 > clear5",
        "clear2 allow1 clear3",
    ),
}


@pytest.mark.parametrize("name", GRAPPLER)
def test_graphs_that_tensorflow_publishes_come_out_as_there(name: str) -> None:
    text, low = GRAPPLER[name]
    assert Graph.of(text).painted()[0] == low


def test_the_published_chain_is_denied_up_to_the_last_clear_op() -> None:
    """auto_mixed_precision.cc names this chain for its second pass, which denies; the fourth then
    gives the last clear node, which is not denied, to its allow neighbour, as in "Simple"."""
    chain = Graph.of("deny1 > infer1 > clear1 > infer2 > clear2 > allow1 > infer3")
    low, denied = chain.painted()
    assert denied == dict.fromkeys(["deny1", "infer1", "clear1", "infer2"], "deny1")
    assert low == "clear2 allow1"


# --- rule by rule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "low", "denied"),
    [
        # 1: allow is low whatever is around it.
        ("deny1 > allow1 > deny2", "allow1", "deny1 deny2"),
        # 2: deny floods through infer, and through clear only where that leads to infer or deny.
        ("deny1 > infer1 > infer2", "", "deny1 infer1 infer2"),
        ("deny1 > clear1 > clear2 > deny2", "", "deny1 deny2 clear1 clear2"),
        ("deny1 > clear1 > allow1", "clear1 allow1", "deny1"),
        ("deny1 > clear1 > other1 > infer1", "", "deny1"),
        ("infer1 > deny1", "", "deny1"),
        ("deny1 > infer1 > allow1 > infer2 > allow2", "allow1 infer2 allow2", "deny1 infer1"),
        # One branch that leads to infer is enough to deny a clear node.
        ("deny1 > clear1 > allow1\nclear1 > infer1", "allow1", "deny1 clear1 infer1"),
        # 3: infer joins only between two allow nodes.
        ("allow1 > infer1 > clear1 > infer2 > allow2", "allow1 infer1 clear1 infer2 allow2", ""),
        ("allow1 > infer1", "allow1", ""),
        ("infer1 > allow1", "allow1", ""),
        ("allow1 > infer1 > other1 > infer2 > allow2", "allow1 allow2", ""),
        # A residual whose other branch is denied.
        ("allow1 > infer1 > allow2\ndeny1 > infer1", "allow1 allow2", "deny1 infer1"),
        # 4: low floods through clear both ways, and back down from there.
        ("clear1 > clear2 > allow1 > clear3 > clear4", "clear1 clear2 allow1 clear3 clear4", ""),
        ("clear1 > allow1\nclear1 > clear2 > infer1", "clear1 allow1 clear2", ""),
        ("clear1 > infer1 > allow1", "allow1", ""),
        # An infer node between two allow nodes spreads too.
        ("allow1 > infer1 > allow2\ninfer1 > clear1", "allow1 infer1 allow2 clear1", ""),
        # Nodes without a colour stop everything.
        ("allow1 > other1 > clear1", "allow1", ""),
        ("other1", "", ""),
    ],
)
def test_each_rule_by_itself(text: str, low: str, denied: str) -> None:
    have_low, have_denied = Graph.of(text).painted()
    assert set(have_low.split()) == set(low.split())
    assert set(have_denied) == set(denied.split())


def test_a_denied_node_names_the_deny_node_that_reached_it_first() -> None:
    _, denied = Graph.of("deny1 > infer1 > infer2 > infer3\ndeny2 > infer3 > infer4").painted()
    assert denied["infer2"] == "deny1"
    assert denied["infer3"] == denied["infer4"] == "deny2"


def test_nothing_to_paint() -> None:
    assert paint({}, ()) == Painted(frozenset(), {})


# --- against a naive reading of the rules --------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Every rule as "repeat until nothing changes", over all edges, on sets."""

    categories: Mapping[int, Category | None]
    edges: Edges

    def low(self) -> set[int]:
        allow, free = self._of(Category.ALLOW), self._undenied()
        after, before = self._grown(allow, free), self._grown(allow, free, back=True)
        low = allow | (after & before)
        clear = free & self._of(Category.CLEAR)
        while True:
            more = self._grown(low, clear) | self._grown(low, clear, back=True)
            if more == low:
                return low
            low = more

    def denied(self) -> set[int]:
        infer, deny = self._of(Category.INFER), self._of(Category.DENY)
        clear = self._of(Category.CLEAR) & self._grown(
            infer | deny, self._of(Category.CLEAR), back=True
        )
        return self._grown(deny, infer | clear)

    def _undenied(self) -> set[int]:
        return self._of(Category.INFER, Category.CLEAR) - self.denied()

    def _of(self, *wanted: Category) -> set[int]:
        return {node for node, category in self.categories.items() if category in wanted}

    def _grown(self, start: set[int], through: set[int], back: bool = False) -> set[int]:
        doubled_batch = set(start)
        for _ in self.categories:
            for source, target in self.edges:
                here, there = (target, source) if back else (source, target)
                if here in doubled_batch and there in through:
                    doubled_batch.add(there)
        return doubled_batch


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[int, Category | None], Edges]:
    size = draw(st.integers(1, 12))
    colours = [Category.CLEAR, Category.INFER, Category.ALLOW, Category.DENY, None]
    categories = {node: draw(st.sampled_from(colours)) for node in range(size)}
    pairs = [(a, b) for b in range(size) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=24)) if pairs else []
    return categories, tuple(edges)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(graphs())
def test_painting_is_the_naive_reading_of_the_rules(
    graph: tuple[dict[int, Category | None], Edges],
) -> None:
    categories, edges = graph
    painted, oracle = paint(categories, edges), Oracle(categories, edges)
    assert painted.denied.keys() == oracle.denied()
    assert painted.low == oracle.low()
    assert not painted.low & painted.denied.keys()
    for node, root in painted.denied.items():
        assert categories[root] is Category.DENY
        assert _is_reached(node, root, edges, painted.denied.keys())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(graphs(), st.randoms(use_true_random=False))
def test_painting_does_not_hang_on_the_order_of_nodes_and_edges(
    graph: tuple[dict[int, Category | None], Edges], random: Random
) -> None:
    categories, edges = graph
    nodes = list(categories)
    random.shuffle(nodes)
    number = dict(enumerate(nodes))
    shuffled = [(number[a], number[b]) for a, b in edges]
    random.shuffle(shuffled)
    renamed = paint({number[n]: categories[n] for n in nodes}, shuffled)
    painted = paint(categories, edges)
    assert renamed.low == {number[n] for n in painted.low}
    assert renamed.denied.keys() == {number[n] for n in painted.denied}


def _is_reached(node: int, root: int, edges: Edges, through: Iterable[int]) -> bool:
    reached, allowed = {root}, set(through)
    for _ in allowed:
        reached |= {b for a, b in edges if a in reached and b in allowed}
    return node in reached
