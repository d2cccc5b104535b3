"""The operators of both branches, put where the condition stands."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx

from amp_convert.capture.branches.choices import BRANCH, CHOICE
from amp_convert.capture.node_info import user_frame

aten = torch.ops.aten

Owners = Mapping[str, tuple[str, str]]
"""The module that holds a tensor, as its path and class, by the tensor's placeholder."""


def inline_branches(graph_module: fx.GraphModule, owners: Owners) -> bool:
    """Put all branches that can be into the functional graph around them; whether there were any.

    A branch knows no modules. An operator that reads the tensors of one module is taken for that
    module's, any other for the one that has the condition.
    """
    found = False
    for node in list(graph_module.graph.nodes):
        if _can_be_inlined(graph_module, node):
            branches = _branches(graph_module, node)
            for branch in branches:
                inline_branches(branch, {})
            _inline(node, branches, owners)
            found = True
    return found


def _branches(graph_module: fx.GraphModule, cond: fx.Node) -> list[fx.GraphModule]:
    _, *regions, _ = cast(tuple[Any, ...], cond.args)
    return [getattr(graph_module, str(region.target)) for region in regions]


def _can_be_inlined(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not torch.ops.higher_order.cond:
        return False
    condition = node.args[0]
    known = condition.meta.get("val") if isinstance(condition, fx.Node) else None
    if not isinstance(known, torch.Tensor) or known.dim():
        return False
    return all(map(_only_computes, _branches(graph_module, node)))


def _only_computes(branch: fx.GraphModule) -> bool:
    outputs: Any = branch.graph.output_node().args[0]
    return all(isinstance(n, fx.Node) for n in outputs) and all(
        node.op in ("placeholder", "output", "get_attr")
        or node.target is operator.getitem
        or _can_be_inlined(branch, node)
        or (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "aten"
            and not node.target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
        for node in branch.graph.nodes
    )


def _inline(cond: fx.Node, branches: list[fx.GraphModule], owners: Owners) -> None:
    graph = cond.graph
    condition, *regions, operands = cast(tuple[Any, ...], cond.args)
    with graph.inserting_before(cond):
        given = [
            _copied(cond, side, branch.graph, operands, owners)
            for side, branch in enumerate(branches, 1)
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
    cond: fx.Node, side: int, branch: fx.Graph, operands: Any, owners: Owners
) -> list[fx.Node]:
    """The results of a branch, whose nodes now stand before the condition."""
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

        def renamed(inner: str) -> str:
            return f"{cond.name}_{side}_{inner}"

        if CHOICE in copy.meta:  # of a condition within the branch
            copy.meta[CHOICE] = renamed(copy.meta[CHOICE])
        within = tuple((renamed(name), place) for name, place in copy.meta.get(BRANCH, ()))
        copy.meta[BRANCH] = ((cond.name, side), *within)
        if "custom" in cond.meta:
            copy.meta["custom"] = {**cond.meta["custom"], **copy.meta.get("custom", {})}
    return [values[output] for output in outputs]
