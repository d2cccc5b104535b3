"""Attention as eager calls it: without a mask where the mask says nothing.

Eager transformers looks at a mask's values: one that is true everywhere is left away, and one that
is true up to the diagonal becomes `is_causal`, for which devices have faster kernels. A trace
cannot look, so it writes every mask out, and attention turns a boolean mask into numbers again in
each layer.

Here the boolean masks of `scaled_dot_product_attention` are cut out, each into a graph of its own
(`MaskForm`), which makes the same test once a call. The mask is computed from the sizes of inputs,
and perhaps from masks that the user gives. Where those are 1 everywhere, it depends on sizes alone:
its form for them is kept. Otherwise it is computed as traced. Either way it is turned into numbers
once, in the dtype of the queries, and layers share it.

A mask that is computed from anything else stays where it is, and is turned into numbers once.

Keeps: the mathematics. A kernel for no mask may add in another order than one for a mask that is
true everywhere. `is_causal` is used only for a mask whose values, for these sizes, are those of the
lower triangle of a square.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from amp_convert.rewrite.kernels.aliasing import is_pure
from amp_convert.rewrite.kernels.sizes_alone import (
    cut_out,
    erase_unread,
    first_call,
    for_all_modes,
    is_size,
    keep,
)

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_MASK = 3
"""The place of the mask among attention's arguments: query, key, value, mask, dropout, causal."""

Form = tuple[torch.Tensor | None, bool]
"""The mask in numbers, or None, and whether attention is causal."""


class MaskForm(nn.Module):
    """A mask's graph, and the forms of the mask for the last sizes. It takes `sizes` numbers, then
    the masks that the user gives."""

    def __init__(self, graph_module: fx.GraphModule, sizes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.graph_module, self._sizes, self._dtype = graph_module, sizes, dtype
        self._kept: dict[tuple[Any, ...], Form] = {}

    def forward(self, *inputs: Any) -> Form:
        """The form for these inputs."""
        given = inputs[self._sizes :]
        if not all(bool((mask == 1).all()) for mask in given):
            return additive(self.graph_module(*inputs)[0], self._dtype), False
        key = (*inputs[: self._sizes], *((mask.shape, mask.device) for mask in given))
        found = self._kept.get(key)
        if found is None:
            with for_all_modes():
                found = keep(self._kept, key, self._form(self.graph_module(*inputs)[0]))
        return found

    def _form(self, mask: torch.Tensor) -> Form:
        if bool(mask.all()):
            return None, False
        if mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2]:
            square = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
            if torch.equal(mask, square.expand_as(mask)):
                return None, True
        if mask.dim() and mask.shape[0] > 1 and bool((mask == mask[:1]).all()):
            mask = mask[:1]  # one for all samples
        return additive(mask, self._dtype), False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to the scores: 0, or -inf. As attention's kernels do it."""
    zero, nothing = (
        torch.scalar_tensor(value, dtype=dtype, device=mask.device)
        for value in (0.0, float("-inf"))
    )
    return torch.where(mask, zero, nothing)


def share_masks(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Give every boolean mask of attention its form; the masks' graphs come into `modules`."""
    layers: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        mask, dtype = _mask(node), node.args[0].meta.get("dtype")
        if mask is not None and dtype is not None and mask.meta.get("dtype") is torch.bool:
            layers.setdefault((mask, dtype), []).append(node)
    for (mask, dtype), nodes in layers.items():
        leaves = _leaves(mask)
        if leaves is not None and not any(_is_causal(node) for node in nodes):
            _replace(graph, modules, mask, dtype, nodes, leaves)
        elif len(nodes) > 1:
            with graph.inserting_after(mask):
                shared = graph.call_function(additive, (mask, dtype))
            shared.meta = {**mask.meta, "dtype": dtype}
            for node in nodes:
                _give(node, shared, causal=None)
    erase_unread(graph)


def _replace(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    mask: fx.Node,
    dtype: torch.dtype,
    nodes: list[fx.Node],
    leaves: list[fx.Node],
) -> None:
    part, sizes, given = cut_out(graph, [mask], leaves)
    name = f"mask_{len(modules)}"
    modules[name] = MaskForm(part, len(sizes), dtype)
    with graph.inserting_before(first_call(graph)):
        inputs = [graph.call_function(aten.sym_size.int, size.args) for size in sizes]
        form = graph.call_module(name, (*inputs, *given))
        numbers = graph.call_function(operator.getitem, (form, 0))
        causal = graph.call_function(operator.getitem, (form, 1))
    for node in nodes:
        _give(node, numbers, causal)


def _mask(node: fx.Node) -> fx.Node | None:
    found = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
    return found if isinstance(found, fx.Node) else None


def _is_causal(node: fx.Node) -> bool:
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def _give(node: fx.Node, mask: fx.Node, causal: fx.Node | None) -> None:
    """Let attention take another mask and, if given, another word for whether it is causal."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args[_MASK:], strict=False)) | dict(node.kwargs)
    given["attn_mask"] = mask
    if causal is not None:
        given["is_causal"] = causal
    node.args, node.kwargs = node.args[:_MASK], given


def _leaves(mask: fx.Node) -> list[fx.Node] | None:
    """The masks of the user's that a mask is computed from; None where it is computed from more."""
    leaves: dict[fx.Node, None] = {}
    stack, seen = [mask], {mask}
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            dtype = node.meta.get("dtype")
            if not node.meta.get("user") or dtype is None or dtype.is_floating_point:
                return None
            leaves[node] = None
        elif node.op != "call_function" or not (is_size(node) or is_pure(node)):
            return None
        elif not is_size(node):
            stack += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return list(leaves)
