"""One branch of a condition is computed, not both.

The graph that the stages look at computes both branches of a `torch.cond` and takes one with
`aten.where` (see `capture.branches`). Here what one branch alone reads goes into a graph of its
own, casts and all, and only the chosen one is run (`Choice`).

Takes for granted that what is moved is pure and draws nothing: other operators stay where they are.
Keeps: every bit, those of gradients included.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.branches import CHOICE, choices_of, read_by_one
from amp_convert.rewrite.kernels.aliasing import is_pure

aten = torch.ops.aten


class Choice(nn.Module):
    """Two graphs of the same operands, of which one is run: the first where the condition holds."""

    def __init__(self, branches: Sequence[fx.GraphModule]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self._unread = [
            [i for i, n in enumerate(b.graph.find_nodes(op="placeholder")) if not n.users]
            for b in branches
        ]

    def forward(self, condition: torch.Tensor, *operands: Any) -> tuple[Any, ...]:
        """The results of one branch. Operands that it does not read get zeros for gradients."""
        if torch.compiler.is_compiling():
            one, other = self.branches
            compiled: tuple[Any, ...] = tuple(torch.cond(condition, one, other, operands))
            return compiled
        chosen = 0 if condition else 1
        results: tuple[Any, ...] = tuple(self.branches[chosen](*operands))
        if torch.is_grad_enabled():
            given = [operands[i] for i in self._unread[chosen]]
            unread = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
            if unread:
                results = _Unread.apply(len(results), *results, *unread)  # type: ignore[no-untyped-call]
        return results


class _Unread(torch.autograd.Function):
    """Gives its first `count` values back, and the others zeros for gradients."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.zeros = [(x.shape, x.dtype, x.device) for x in values[count:]]
        ctx.mark_non_differentiable(*(x for x in values[:count] if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in values[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if wanted else None
            for (shape, dtype, device), wanted in zip(
                ctx.zeros, ctx.needs_input_grad[1 + len(gradients) :], strict=True
            )
        ]
        return None, *gradients, *zeros


def nest(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Put what one branch of a condition alone reads into a graph of its own; its module is added
    to `modules`. A condition within a branch moves with it, so the last one comes first."""
    moved: set[fx.Node] = set()
    for name, choices in reversed(choices_of(graph).items()):
        if not moved.issuperset(choices):
            moved |= _nest(graph, modules, f"branches_of_{name}", choices)


def _nest(
    graph: fx.Graph, modules: dict[str, nn.Module], name: str, choices: list[fx.Node]
) -> set[fx.Node]:
    """Nest one condition, where its results are read together and have one dtype each; gives what
    was moved."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = choices[-1]
    sides: list[list[Any]] = [[choice.args[i] for choice in choices] for i in (1, 2)]
    if any(order[user] < order[last] for choice in choices for user in choice.users):
        return set()
    if any(a.meta.get("dtype") != b.meta.get("dtype") for a, b in zip(*sides, strict=True)):
        return set()
    parts = [read_by_one(list(order), choices, i, is_pure) for i in (1, 2)]
    operands = list(
        dict.fromkeys(
            source
            for part, side in zip(parts, sides, strict=True)
            for source in (*side, *(n for node in part for n in node.all_input_nodes))
            if source not in part
        )
    )
    modules[name] = Choice(
        [_graph_of(part, operands, side) for part, side in zip(parts, sides, strict=True)]
    )
    with graph.inserting_before(last):
        whole = graph.call_module(name, (last.args[0], *operands))
        results = [graph.call_function(operator.getitem, (whole, i)) for i in range(len(choices))]
    for choice, result in zip(choices, results, strict=True):
        result.meta = {key: choice.meta[key] for key in choice.meta if key != CHOICE}
        choice.replace_all_uses_with(result)
        graph.erase_node(choice)
    moved = {*parts[0], *parts[1]}
    for node in sorted(moved, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    return moved.union(choices)


def _graph_of(
    part: list[fx.Node], operands: list[fx.Node], results: Sequence[Any]
) -> fx.GraphModule:
    """The graph of one branch. What it gives is its own, as `torch.cond` wants it."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in operands}
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    own = [
        graph.call_function(aten.clone.default, (copies[n],)) if n in operands else copies[n]
        for n in results
    ]
    graph.output(tuple(own))
    modules: dict[str, nn.Module] = {}
    nest(graph, modules)
    return fx.GraphModule(modules, graph)
