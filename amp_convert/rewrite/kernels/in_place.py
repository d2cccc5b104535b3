"""Writes in place, where nobody else reads the value that is written over.

A trace is functional: `relu_` and `+=` became operators that allocate. Here an operator with an
in-place form takes it when its argument

1. is the result of an operator that allocates it, or that itself writes over such a value here: no
   input, weight or view, nor what could be one,
2. is read by this operator alone, and there once,
3. has the shape and dtype of the result, for every input that the graph takes.

`add` and `mul` may write over either argument. The graph then may run only without gradients, since
autograd could have saved what is written over; and it comes last, since whoever runs a graph node
by node must find each value as it was made.

Keeps: every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import fx

aten = torch.ops.aten

_COMMUTE = {aten.add.Tensor, aten.mul.Tensor}
# Made of other operators, these still allocate their results. Of others of that kind, some give
# their argument back: `dropout`, `contiguous`, `einsum`.
_ALLOCATE = {
    aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default,
}  # fmt: skip


def write(graph: fx.Graph, allocating: frozenset[object] = frozenset()) -> None:
    """Let operators write in place where they may; `allocating` are functions of our own that
    allocate their results."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or (form := in_place_form(node.target)) is None:
            continue
        for place in _places(node):
            value = node.args[place]
            if isinstance(value, fx.Node) and _is_free(value, node, written, allocating):
                if place:
                    node.args = (value, node.args[0])
                node.target = form
                written.add(node)
                break


@cache
def in_place_form(target: object) -> torch._ops.OpOverload | None:
    """The overload that writes the result over the first argument and takes the same arguments."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(aten, f"{target._opname}_", None)
    form: torch._ops.OpOverload | None = getattr(packet, target._overloadname, None)
    if form is None or target.is_view or len(target._schema.returns) != 1:
        return None
    if [a.name for a in form._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    writes = [a.alias_info is not None and a.alias_info.is_write for a in form._schema.arguments]
    return form if writes[:1] == [True] and not any(writes[1:]) else None


def _places(node: fx.Node) -> Iterator[int]:
    """The arguments that may be written over, the first one first."""
    yield 0
    if node.target in _COMMUTE and len(node.args) == 2 and not node.kwargs:
        yield 1


def _is_free(
    value: fx.Node, writer: fx.Node, written: set[fx.Node], allocating: frozenset[object]
) -> bool:
    if list(value.users) != [writer] or _times_read(writer, value) != 1:
        return False
    if value not in written and not allocates(value.target, allocating):
        return False
    same = [(n.meta.get("shape"), n.meta.get("dtype")) for n in (value, writer)]
    return same[0] == same[1] and None not in same[0]


def _times_read(reader: fx.Node, value: fx.Node) -> int:
    read: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), read.append)
    return read.count(value)


def allocates(target: object, allocating: frozenset[object]) -> bool:
    """Whether the result of an operator is its own, and no part of what it was given."""
    if target in allocating or target in _ALLOCATE:
        return True
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1:
        return False
    if any(r.alias_info is not None for r in target._schema.returns):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )
