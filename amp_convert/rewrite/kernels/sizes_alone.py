"""What depends on input sizes alone is computed once for each set of sizes.

Positions, masks of positions, offsets of windows: a trace computes them anew at each call, from
`arange` on. Here what such values are computed from is cut out into a graph of its own, whose
results are kept for the last few sets of sizes (`Remembered`).

Takes for granted that its operators are pure and draw no random numbers: others are left alone.
Keeps: every bit. A kept value must not be written to, so one that the caller would get is left in
the graph.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn

from amp_convert.rewrite.kernels.aliasing import is_pure, reaches_output

aten = torch.ops.aten

KEPT = 8
"""Sets of sizes whose values are remembered."""


class Remembered(nn.Module):
    """A graph of sizes whose last results are kept, and forgotten in copies and files."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._kept: dict[tuple[int, ...], Any] = {}

    def forward(self, *sizes: int) -> Any:
        """The graph's results for these sizes."""
        found = self._kept.get(sizes)
        if found is None:
            with for_all_modes():
                found = keep(self._kept, sizes, self.graph_module(*sizes))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


_LOCK = threading.Lock()
_T = TypeVar("_T")


@contextlib.contextmanager
def for_all_modes() -> Iterator[None]:
    """What is made here may be used with gradients later, also where this call is in
    `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def keep(kept: dict[Any, _T], key: Any, value: _T) -> _T:
    """Keep a value, and forget the oldest where there are too many. Threads may meet here."""
    with _LOCK:
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = value
    return value


def remember(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Cut what depends on sizes alone out of `graph`; its own graph comes into `modules`."""
    alone = depending_on_sizes(graph)
    wanted = [
        node
        for node in alone
        if gives_tensor(node)
        and any(user not in alone for user in node.users)
        and not reaches_output(node)
    ]
    if not any(_computes(node) for node in alone if gives_tensor(node)) or not wanted:
        return
    part, sizes, _ = cut_out(graph, wanted)
    name = "sizes_alone"
    modules[name] = Remembered(part)
    with graph.inserting_before(first_call(graph)):
        given = [graph.call_function(aten.sym_size.int, size.args) for size in sizes]
        whole = graph.call_module(name, tuple(given))
        results = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(wanted))]
    for node, result in zip(wanted, results, strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
    erase_unread(graph)


def depending_on_sizes(graph: fx.Graph) -> dict[fx.Node, None]:
    """The calls that depend on the sizes of inputs, and on nothing else, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (
            is_size(node) or (is_pure(node) and all(n in found for n in node.all_input_nodes))
        ):
            found[node] = None
    return found


def erase_unread(graph: fx.Graph) -> None:
    """Erase what a pass has left without a reader."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and is_pure(node):
            graph.erase_node(node)


def is_size(node: fx.Node) -> bool:
    """Whether a node is the size of an input."""
    if node.target is not aten.sym_size.int:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder"


def gives_tensor(node: fx.Node) -> bool:
    return node.meta.get("shape") is not None


def cut_out(
    graph: fx.Graph, wanted: list[fx.Node], leaves: Iterable[fx.Node] = ()
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """A graph for the values of `wanted`, as a tuple, with the sizes and the leaves that it takes,
    in this order."""
    needed: dict[fx.Node, None] = {}
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed[node] = None
            if not is_size(node) and node.op != "placeholder":
                stack += node.all_input_nodes
    sizes = [node for node in graph.nodes if node in needed and is_size(node)]
    read = [leaf for leaf in leaves if leaf in needed]
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in (*sizes, *read)}
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in wanted))
    return fx.GraphModule(nn.Module(), part), sizes, read


def _computes(node: fx.Node) -> bool:
    """Whether a node is more than a view or a number."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view


def first_call(graph: fx.Graph) -> fx.Node:
    """Where what is computed first may stand."""
    found: fx.Node = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    return found
