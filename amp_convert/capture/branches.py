"""The branches of `torch.cond` in the graph around them, so that they are planned, converted and
compared like any other operator.

A branch is a graph of its own, which no stage looks into. `inline_branches` puts the operators of
both where the condition stands, and lets `aten.where` choose among their results. A node's metadata
says which branches it is in (`BRANCH`) and which condition a choice belongs to (`CHOICE`).

No run computes the branch that it does not take: the operators there may raise on the values of the
other, or have no gradient. A run node by node skips them (`OneBranch`, `Choices`): their value is
`UNTAKEN`. A graph that is called whole is cut into graphs again (`nest`), of which one is run.

Left as it is, in FP32, is a condition on sizes, and one with a branch that draws random numbers,
writes to what it is given, or calls what nobody here knows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import fx, nn

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


# --- as a whole ----------------------------------------------------------------------------------


class Choice(nn.Module):
    """Two graphs of the same operands, of which one is run: the first where the condition holds."""

    def __init__(self, branches: Sequence[fx.GraphModule]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, condition: torch.Tensor, *operands: Any) -> tuple[Any, ...]:
        """The results of one branch; with gradients for all operands, as `torch.cond` has them."""
        one, other = self.branches
        if torch.compiler.is_compiling():
            return tuple(torch.cond(condition, one, other, operands))
        chosen = one if condition else other
        if torch.is_grad_enabled() and any(map(_is_differentiable, operands)):
            found: tuple[Any, ...] = _Differentiable.apply(chosen, *operands)  # type: ignore[no-untyped-call]
            return found
        return tuple(chosen(*operands))


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


class _Differentiable(torch.autograd.Function):
    """One branch. Every operand gets a gradient, of zeros where none reaches it: eager does the
    same, and weight decay tells zeros from nothing."""

    @staticmethod
    def forward(ctx: Any, branch: nn.Module, *operands: Any) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            ctx.operands = [
                x.detach().requires_grad_() if _is_differentiable(x) else x for x in operands
            ]
            ctx.results = branch(*ctx.operands)
        ctx.mark_non_differentiable(*(r for r in ctx.results if not r.dtype.is_floating_point))
        # The caller may write to what it gets; what is saved for backward stays as it is.
        return tuple(r.detach().clone() for r in ctx.results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = [x for x in ctx.operands if _is_differentiable(x)]
        pairs = zip(ctx.results, gradients, strict=True)
        reached = [(r, g) for r, g in pairs if r.requires_grad]
        found: Iterator[torch.Tensor | None] = iter([None] * len(wanted))
        if reached:
            results, given = zip(*reached, strict=True)
            found = iter(
                torch.autograd.grad(results, wanted, given, retain_graph=True, allow_unused=True)
            )
        return None, *(
            _or_zeros(next(found), x) if _is_differentiable(x) else None for x in ctx.operands
        )


def _or_zeros(gradient: torch.Tensor | None, operand: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(operand) if gradient is None else gradient


def one_branch(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph as it is called whole: a copy that computes one branch of each condition, or the
    graph itself where there is none."""
    if not any(CHOICE in node.meta for node in graph_module.graph.nodes):
        return graph_module
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    modules: dict[str, nn.Module] = {}
    nest(graph, modules)
    held = {str(n.target): getattr(graph_module, str(n.target))
            for n in graph.find_nodes(op="get_attr")}  # fmt: skip
    return fx.GraphModule({**held, **modules}, graph)


def nest(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Put each branch into a graph of its own again; its module is added to `modules`. A condition
    within a branch moves with it, so the last one comes first."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if CHOICE in node.meta:
            found.setdefault(node.meta[CHOICE], []).append(node)
    moved: set[fx.Node] = set()
    for name, choices in reversed(found.items()):
        if choices[0] not in moved:
            moved |= _nest(graph, modules, name, choices)


def _nest(
    graph: fx.Graph, modules: dict[str, nn.Module], name: str, choices: list[fx.Node]
) -> set[fx.Node]:
    """Nest one condition; gives what was moved."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = choices[-1]
    sides: list[list[Any]] = [[choice.args[i] for choice in choices] for i in (1, 2)]
    dtypes = [_chosen_dtype(choice) for choice in choices]
    parts = [_part(list(order), name, side, choices) for side in (1, 2)]
    operands = list(
        dict.fromkeys(
            source
            for part, side in zip(parts, sides, strict=True)
            for source in (*side, *(n for node in part for n in node.all_input_nodes))
            if source not in part
        )
    )
    module = f"branches_of_{name}"
    modules[module] = Choice(
        [_graph_of(part, operands, side, dtypes) for part, side in zip(parts, sides, strict=True)]
    )
    with graph.inserting_before(last):
        whole = graph.call_module(module, (last.args[0], *operands))
        results = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(choices))]
    for choice, result in zip(choices, results, strict=True):
        result.meta = {key: choice.meta[key] for key in choice.meta if key != CHOICE}
        choice.replace_all_uses_with(result)
        graph.erase_node(choice)
    moved = {*parts[0], *parts[1]}
    for node in sorted(moved, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    return moved.union(choices)


def _part(nodes: list[fx.Node], name: str, side: int, choices: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of a branch, with the casts that it alone reads, in order."""
    found: set[fx.Node] = set()
    for node in nodes:
        within = node.meta.get(BRANCH)
        # What was put in since, such as a cast of a value of the branch, was not told of it.
        told = within is not None or CHOICE in node.meta
        if (name, side) in (within or ()) or (
            not told and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    for node in reversed(nodes):
        if node.target is aten._to_copy.default and not {BRANCH, CHOICE} & node.meta.keys():
            readers = [user for user in node.users if user not in found]
            if node.users and all(r in choices and _places(r, node) == [side] for r in readers):
                found.add(node)
    return [node for node in nodes if node in found]


def _places(reader: fx.Node, node: fx.Node) -> list[int]:
    return [i for i, argument in enumerate(reader.args) if argument is node]


def _chosen_dtype(choice: fx.Node) -> torch.dtype | None:
    """The dtype in which `aten.where` gives what it takes, if the two differ."""
    one, other = (a.meta.get("dtype") for a in choice.args[1:])  # type: ignore[union-attr]
    return None if one is other or not (one and other) else torch.promote_types(one, other)


def _graph_of(
    part: list[fx.Node],
    operands: list[fx.Node],
    results: Sequence[fx.Node],
    dtypes: Sequence[torch.dtype | None],
) -> fx.GraphModule:
    """The graph of one branch. What it gives is its own, as `torch.cond` wants it."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in operands}
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if BRANCH in node.meta:
            copies[node].meta[BRANCH] = node.meta[BRANCH][1:]
    own: list[fx.Node] = []
    for node, dtype in zip(results, dtypes, strict=True):
        value = copies[node]
        if dtype is not None and node.meta.get("dtype") != dtype:
            value = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
        elif node in operands or any(value is other for other in own):
            value = graph.call_function(aten.clone.default, (value,))
        own.append(value)
    graph.output(tuple(own))
    modules: dict[str, nn.Module] = {}
    nest(graph, modules)
    return fx.GraphModule(modules, graph)
