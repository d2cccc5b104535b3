"""A graph with the branches of conditions (see the package) as it is called whole: it computes one
branch of each.

Each branch becomes a graph of its own again, with the casts that it alone reads, and a `Choice`
runs the one that the condition names. Keeps: every bit, and the gradients of `torch.cond`, which
gives one to every operand: zeros where none reaches it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.branches.choices import BRANCH, CHOICE

aten = torch.ops.aten


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
    same, and weight decay tells zeros from nothing. PyTorch makes none for an operand that is a
    leaf: it takes no gradient for "leave `.grad` alone"."""

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
