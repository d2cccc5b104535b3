"""Writes in place, where nobody else reads the value that is written over.

A trace is functional: `relu_` and `+=` became operators that allocate. Here an operator with an
in-place form takes it when its argument

1. is the result of an operator that allocates it, or that itself writes over such a value here: no
   input, weight or view, nor what could be one,
2. is read by this operator alone, and there once,
3. has the shape and dtype of the result, for every input that the graph takes, and lies in memory
   as the result would.

The third is known of pointwise operators: their results lie as their first argument does, where
that leaves no gaps. `add` and `mul` may write over the second argument too, where both lie row by
row and are no images, whose kernels choose a layout. This pass comes last, since whoever runs a
graph node by node must find each value as it was made.

Autograd saves values for the backward pass. A graph that is to be differentiated may write over
those alone that nobody saves: what made the value does not need it, what writes over it needs at
most its own result (`_SAVES_NOTHING`, `_SAVES_RESULT`), and no view of a value may be written to,
since autograd then copies in the backward pass.

Keeps: every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import fx

from amp_convert.capture.captured import Value
from amp_convert.rewrite.kernels.aliasing import allocates

aten = torch.ops.aten

_COMMUTE = {aten.add.Tensor, aten.mul.Tensor}
_IMAGE_DIMENSIONS = 4
"""From here on a kernel may choose a layout that depends on the dtype (channels last)."""


# Autograd keeps neither what these write over nor what they make; of the second, their result.
_SAVES_NOTHING = {aten.add.Tensor, aten.sub.Tensor}
_SAVES_RESULT = {aten.relu.default, aten.sigmoid.default, aten.tanh.default}
_SCALES = {aten.mul.Tensor, aten.div.Tensor}  # by a number: they save nothing
# Autograd does not keep what these make, and it is no view there. Some are made of others that give
# views for inputs of other dimensions than these.
_UNSAVED: dict[object, int | None] = {
    torch.nn.functional.batch_norm: None,
    aten.convolution.default: None, aten.batch_norm.default: None, aten.layer_norm.default: None,
    aten.group_norm.default: None, aten.addmm.default: None, aten.mm.default: None,
    aten.bmm.default: None, aten.baddbmm.default: None, aten.cat.default: None,
    aten.embedding.default: None, aten.add.Tensor: None, aten.sub.Tensor: None,
    aten.mul.Tensor: None, aten.add_.Tensor: None, aten.sub_.Tensor: None, aten.mul_.Tensor: None,
    aten.linear.default: 2, aten.conv1d.default: 3, aten.conv2d.default: 4, aten.conv3d.default: 5,
}  # fmt: skip


def write(
    graph: fx.Graph,
    allocating: frozenset[object] = frozenset(),
    *,
    differentiable: bool = False,
) -> None:
    """Let operators write in place where they may; `allocating` are functions of our own that
    allocate their results. With `differentiable`, autograd may go through the graph."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or (form := in_place_form(node.target)) is None:
            continue
        if differentiable and not _needs_no_input(node):
            continue
        for place in _places(node):
            value = node.args[place]
            if isinstance(value, fx.Node) and _is_free(value, node, written, allocating):
                if differentiable and not _is_unsaved(value):
                    continue
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
    if torch.Tag.pointwise not in target.tags or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    writes = [a.alias_info is not None and a.alias_info.is_write for a in form._schema.arguments]
    return form if writes[:1] == [True] and not any(writes[1:]) else None


def _places(node: fx.Node) -> Iterator[int]:
    """The arguments that may be written over, the first one first."""
    yield 0
    if node.target in _COMMUTE and len(node.args) == 2 and not node.kwargs:
        given = [n for n in node.args if isinstance(n, fx.Node)]
        small = all(len(n.meta.get("shape") or ()) < _IMAGE_DIMENSIONS for n in given)
        if len(given) == 2 and small and all(map(_is_by_rows, given)):
            yield 1


def _is_free(
    value: fx.Node, writer: fx.Node, written: set[fx.Node], allocating: frozenset[object]
) -> bool:
    if list(value.users) != [writer] or _times_read(writer, value) != 1:
        return False
    if value not in written and not allocates(value.target, allocating):
        return False
    known = [(n.meta.get("shape"), n.meta.get("dtype")) for n in (value, writer)]
    if known[0] != known[1] or None in known[0]:
        return False
    one, other = (n.meta.get("recorded") for n in (value, writer))
    return one is not None and other is not None and one.stride == other.stride and _is_dense(one)


def _needs_no_input(node: fx.Node) -> bool:
    """Whether the gradient of an operator can do without what its in-place form writes over."""
    if node.target in _SCALES:
        return len(node.args) == 2 and isinstance(node.args[1], int | float)
    return node.target in _SAVES_NOTHING or node.target in _SAVES_RESULT


def _is_unsaved(value: fx.Node) -> bool:
    """Whether what made a value does not save it, and gives it as no view."""
    if value.target not in _UNSAVED:
        return False
    wanted, shape = _UNSAVED[value.target], value.meta["shape"]
    return wanted is None or len(shape) == wanted


def _times_read(reader: fx.Node, value: fx.Node) -> int:
    read: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), read.append)
    return read.count(value)


def _is_by_rows(value: fx.Node) -> bool:
    """Whether a value lay in memory row by row when it was recorded."""
    seen = value.meta.get("recorded")
    return seen is not None and torch.empty(seen.shape, device="meta").stride() == seen.stride


def _is_dense(seen: Value) -> bool:
    """Whether a value's memory holds its elements and nothing else, in whatever order."""
    step = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(seen.stride, seen.shape, strict=True) if n > 1
    ):
        if stride != step:
            return False
        step *= size
    return True
