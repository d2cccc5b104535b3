"""The branches of `torch.cond` in the graph around them, so that they are planned, converted and
compared like any other operator.

A branch is a graph of its own, which no stage looks into. Here the operators of both are put where
the condition stands, and `aten.where` takes one branch's results: the same values, and no gradient
but zeros for the other branch, as `torch.cond` has it. What runs computes one branch alone again
(see `rewrite.kernels.branches`); the stages that look at each node see both.

Left as it is, in FP32, is a condition on sizes, and one with a branch that draws random numbers,
writes to what it is given, or calls what nobody here knows: both branches are computed, so neither
may do more than compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from amp_convert.capture.node_info import user_frame

aten = torch.ops.aten
CHOICE = "choice"
"""The key in a node's metadata that marks an `aten.where` as a condition's, with its name."""

Owners = Mapping[str, tuple[str, str]]
"""The module that holds a tensor, as its path and class, by the tensor's placeholder."""


def choices_of(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The results of each condition in a graph, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if CHOICE in node.meta:
            found.setdefault(node.meta[CHOICE], []).append(node)
    return found


def read_by_one(
    nodes: Sequence[fx.Node],
    choices: Collection[fx.Node],
    side: int,
    may_be: Callable[[fx.Node], bool] = lambda _: True,
) -> list[fx.Node]:
    """The calls, of those that `may_be` any, that the results of one branch read and nothing else
    does; `side` is the branch's place among the arguments of `aten.where`: 1, or 2."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "call_function" and node not in choices and node.users and may_be(node):
            readers = [user for user in node.users if user not in found]
            if all(r in choices and _places(r, node) == [side] for r in readers):
                found.add(node)
    return [node for node in nodes if node in found]


def _places(reader: fx.Node, node: fx.Node) -> list[int]:
    return [i for i, argument in enumerate(reader.args) if argument is node]


class Taken:
    """Which nodes of a graph belong to a branch that a run takes."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self._needs: dict[fx.Node, list[tuple[fx.Node, bool]]] = {}
        for choices in choices_of(graph).values():
            condition = choices[0].args[0]
            assert isinstance(condition, fx.Node)
            for side in (1, 2):
                for node in read_by_one(nodes, choices, side):
                    self._needs.setdefault(node, []).append((condition, side == 1))

    def __call__(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        """Whether the run that made these values takes the branches that the node is in. A
        condition is known as long as its branches run."""
        return all(bool(values[c]) == holds for c, holds in self._needs.get(node, ()))


def inline_branches(graph_module: fx.GraphModule, owners: Owners) -> bool:
    """Put all branches that can be into the functional graph around them; whether there were any.

    A branch knows no modules. An operator that reads the tensors of one module is taken for that
    module's, any other for the one that has the condition.
    """
    found = False
    for node in list(graph_module.graph.nodes):
        if node.target is torch.ops.higher_order.cond:
            condition, one, other, _ = node.args
            branches = [getattr(graph_module, str(n.target)) for n in (one, other)]
            for branch in branches:
                inline_branches(branch, {})
            if _is_one_value(condition) and all(map(_only_computes, branches)):
                _inline(node, branches, owners)
                found = True
    return found


def _is_one_value(value: Any) -> bool:
    """Whether a condition is one value, and no size."""
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(known, torch.Tensor) and not known.dim()


def _only_computes(branch: fx.GraphModule) -> bool:
    return all(
        node.op in ("placeholder", "output")
        or node.target is operator.getitem
        or (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "aten"
            and not node.target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
        for node in branch.graph.nodes
    ) and _gives_tensors(branch)


def _gives_tensors(branch: fx.GraphModule) -> bool:
    outputs: Any = branch.graph.output_node().args[0]
    return all(isinstance(n, fx.Node) for n in outputs)


def _inline(cond: fx.Node, branches: list[fx.GraphModule], owners: Owners) -> None:
    graph = cond.graph
    condition, *regions, operands = cast(tuple[Any, ...], cond.args)
    with graph.inserting_before(cond):
        given = [
            _copied(cond, f"{cond.name}_{i}", branch.graph, operands, owners)
            for i, branch in enumerate(branches)
        ]
        results = []
        for one, other in zip(*given, strict=True):
            result = graph.call_function(aten.where.self, (condition, one, other))
            result.meta = {**cond.meta, "val": one.meta["val"], CHOICE: cond.name}
            results.append(result)
    for user in list(cond.users):  # the condition gives a tuple
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(cond)
    for region in regions:
        if not region.users:
            graph.erase_node(region)


def _copied(
    cond: fx.Node, name: str, branch: fx.Graph, operands: Any, owners: Owners
) -> list[fx.Node]:
    """The results of the branch `name`, whose nodes now stand before the condition."""
    values = dict(zip(branch.find_nodes(op="placeholder"), operands, strict=True))
    outputs: Any = branch.output_node().args[0]
    for node in branch.nodes:
        if node.op in ("placeholder", "output"):
            continue
        values[node] = copy = cond.graph.node_copy(node, values.__getitem__)
        if not user_frame(copy.meta.get("stack_trace") or ""):
            copy.meta["stack_trace"] = cond.meta.get("stack_trace")
        stack = dict(cond.meta.get("nn_module_stack") or {})
        holders = {owners[n.name] for n in copy.all_input_nodes if n.name in owners}
        if len(holders) == 1:
            (holder,) = holders
            stack[holder[0]] = holder
        copy.meta["nn_module_stack"] = stack
        if CHOICE in copy.meta:  # of a condition within the branch
            copy.meta[CHOICE] = f"{name}_{copy.meta[CHOICE]}"
        if "custom" in cond.meta:
            copy.meta["custom"] = {**cond.meta["custom"], **copy.meta.get("custom", {})}
    return [values[output] for output in outputs]
