"""The branches of `torch.cond` in the graph around them, so that they are planned, converted and
compared like any other operator.

A branch is a graph of its own, which no stage looks into. `inline_branches` puts the operators of
both where the condition stands, and lets `aten.where` choose among their results. A node's metadata
says which branches it is in (`BRANCH`) and which condition a choice belongs to (`CHOICE`).

No run computes the branch that it does not take: the operators there may raise on the values of the
other, or have no gradient. A run node by node skips them (`OneBranch`, `Choices`): their value is
`UNTAKEN`. A graph that is called whole is cut into graphs again (see `one_branch`).

Left as it is, in FP32, is a condition on sizes, and one with a branch that draws random numbers,
writes to what it is given, or calls what nobody here knows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

import torch
from torch import fx

from amp_convert.capture.node_info import user_frame

aten = torch.ops.aten
CHOICE = "choice"
"""The key in the metadata of an `aten.where` that takes the results of one branch: the name of the
condition."""
BRANCH = "branch"
"""The key in the metadata of a node in a branch: pairs of a condition's name and the place of the
branch's results among the arguments of `aten.where`, 1 or 2, the outermost condition first."""

Owners = Mapping[str, tuple[str, str]]
"""The module that holds a tensor, as its path and class, by the tensor's placeholder."""


# --- into one graph ------------------------------------------------------------------------------


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


# --- node by node --------------------------------------------------------------------------------


class Untaken(Enum):
    """What stands for the value of a node in a branch that a run does not take."""

    UNTAKEN = "untaken"


UNTAKEN = Untaken.UNTAKEN


class Choices:
    """Which nodes of a graph with conditions, captured or rewritten, a run computes."""

    def __init__(self, graph: fx.Graph) -> None:
        self._conditions = {n.meta[CHOICE]: n.args[0] for n in graph.nodes if CHOICE in n.meta}

    def instead(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What a node gives without being run: `UNTAKEN`, or a choice's result; None where it is to
        be run. `values` are those of the nodes before it."""
        if not self._conditions:
            return None
        for name, side in node.meta.get(BRANCH, ()):
            if bool(values[self._conditions[name]]) != (side == 1):
                return UNTAKEN
        if CHOICE in node.meta:
            condition, one, other = cast(tuple[Any, ...], node.args)
            return values[one if values[condition] else other]
        # A cast of what was not computed, which no branch was told of.
        return UNTAKEN if any(values.get(n) is UNTAKEN for n in node.all_input_nodes) else None


class OneBranch(fx.Interpreter):
    """Runs a graph node by node, and of its branches those that are taken."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._choices = Choices(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        instead = self._choices.instead(n, self.env)
        return super().run_node(n) if instead is None else instead
