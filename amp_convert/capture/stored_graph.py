"""A graph as plain data, for copies, files and the cache.

FX stores a graph as its Python code and traces that code when it is loaded: calls without tensor
inputs, such as `torch.rand`, are then run once and for all, and what was known of each node is
lost. Here nodes are stored as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from amp_convert.capture.branches.choices import BRANCH, CHOICE

_KEPT = ("shape", "dtype", "recorded", CHOICE, BRANCH)


_FUNCTIONS: dict[str, Any] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_"),
        (math, "floor ceil trunc sqrt"),
        (torch, "sym_max sym_min sym_float sym_int sym_ite sym_not sym_sum"),
    )
    for name in names.split()
    if hasattr(module, name)
}
"""The functions that take tuples apart and compute with sizes, by name: a closed list, since the
name may come from a file."""


@dataclass(frozen=True)
class NodeRef:
    """A node among the arguments of another."""

    name: str


@dataclass(frozen=True)
class OperatorRef:
    """One of PyTorch's operators, by its names in `torch.ops`; they cannot be stored."""

    path: tuple[str, ...]


@dataclass(frozen=True)
class FunctionRef:
    """One of `_FUNCTIONS`."""

    name: str


@dataclass(frozen=True)
class StoredGraph:
    """Nodes in order, as (op, name, target, args, kwargs, meta), and the module's attributes that
    they read."""

    nodes: tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]
    attributes: Mapping[str, Any]


def stored(graph_module: fx.GraphModule) -> StoredGraph:
    """A graph as data."""
    nodes, attributes = [], {}
    for node in graph_module.graph.nodes:
        given: Any = map_aggregate((node.args, node.kwargs), _without_nodes)
        meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
        nodes.append((node.op, node.name, _named(node.target), *given, meta))
        if node.op == "get_attr":
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(graph_module)
    return StoredGraph(tuple(nodes), attributes)


def _without_nodes(leaf: Any) -> Any:
    return NodeRef(leaf.name) if isinstance(leaf, fx.Node) else leaf


def restored(data: StoredGraph) -> fx.GraphModule:
    """The graph that was stored."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def node_of(leaf: Any) -> Any:
        return made[leaf.name] if isinstance(leaf, NodeRef) else leaf

    for op, name, target, args, kwargs, meta in data.nodes:
        given: Any = map_aggregate((args, kwargs), node_of)
        made[name] = graph.create_node(op, _called(target), given[0], given[1], name)
        made[name].name = name  # FX would not have one that is a builtin's, as export does
        made[name].meta.update(meta)
    root = dict(data.attributes) or nn.Module()
    return fx.GraphModule(root, graph)


def _named(target: Any) -> Any:
    for name, function in _FUNCTIONS.items():
        if target is function:
            return FunctionRef(name)
    if isinstance(target, torch._ops.OpOverload):
        return OperatorRef((target.namespace, target._opname, target._overloadname))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return OperatorRef(("higher_order", target.name()))
    return target


def _called(target: Any) -> Any:
    if isinstance(target, FunctionRef):
        return _FUNCTIONS[target.name]
    if not isinstance(target, OperatorRef):
        return target
    found: Any = torch.ops
    for part in target.path:
        found = getattr(found, part)
    return found
