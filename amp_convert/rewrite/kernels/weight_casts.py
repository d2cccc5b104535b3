"""The weights of a block are cast together.

A call casts each weight to its low dtype, and the backward pass casts each gradient back: two small
kernels a weight, which a device does one after the other. Here the casts of one block of the model
(`layers.3`, or a part at the top) are one call each way: `_foreach_copy_`, which devices do in one
kernel. PyTorch has no derivative for it, so `_Cast` says it. A block and no more: the backward
pass of the cast waits for the gradients of all that were cast together, and gradients are to come,
and to be sent to other processes, while it still runs.

No cast outlives its call: nothing tells whether a weight was changed since (fused optimizers and
`.data` change no version).

Keeps: every bit, forward and backward.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.graph_signature import InputSpec, Source
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.rewrite.kernels.casts import asked
from amp_convert.rewrite.kernels.transforms import is_transformed

LARGEST = 2**24
"""Numbers that are cast by one call: 32 MiB in low precision, about what DDP sends at once."""


def group(graph: fx.Graph, placeholders: Mapping[fx.Node, InputSpec]) -> None:
    """Cast the parameters of each block by one call, where the first of them is read."""
    blocks: dict[tuple[str, torch.dtype], list[fx.Node]] = {}
    for node in graph.nodes:
        wanted = asked(node)
        if wanted not in LOW_DTYPES:
            continue
        source = node.args[0]
        spec = placeholders.get(source)
        if spec is not None and spec.source is Source.PARAMETER:
            blocks.setdefault((_block(spec.target), wanted), []).append(node)
    for nodes in (part for block in blocks.values() for part in _parts(block)):
        if len(nodes) < 2:
            continue
        wanted = asked(nodes[0])
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(cast_together, (wanted, *(n.args[0] for n in nodes)))
            results = [
                graph.call_function(operator.getitem, (together, i)) for i in range(len(nodes))
            ]
        for node, result in zip(nodes, results, strict=True):
            result.meta = node.meta
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _parts(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The casts of a block, in parts of at most `LARGEST` numbers: a model need not be built of
    blocks that have a number."""
    part: list[fx.Node] = []
    total = 0
    for node in nodes:
        numbers = math.prod(node.meta.get("shape") or ())
        if part and total + numbers > LARGEST:
            yield part
            part, total = [], 0
        part.append(node)
        total += numbers
    yield part


def _block(name: str) -> str:
    """The block that a parameter belongs to: its path up to the first number, or its first part."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def cast_together(dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` in `dtype`, each in a memory layout as its own; one kernel for all, on devices that
    have one. Tensors of subclasses, such as sharded ones, are cast one by one, by their own word.
    """
    return _cast([dtype] * len(tensors), tensors)


def _cast(
    dtypes: Sequence[torch.dtype], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    if is_transformed() or not all(map(_is_plain, tensors)):
        return tuple(t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        found: tuple[torch.Tensor, ...] = _Cast.apply(dtypes, *tensors)  # type: ignore[no-untyped-call]
        return found
    return _copies(dtypes, tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    """No tensor of a subclass, nor a batch of them, as gradients may come: the one kernel knows
    neither."""
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) in (torch.Tensor, nn.Parameter) and not batched


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtypes: Sequence[torch.dtype], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        made = _copies(dtypes, tensors)
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(m for m, w in zip(made, wanted, strict=True) if not w))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        given = [(g, d) for g, d in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        made = iter(_cast([d for _, d in given], [g for g, _ in given]) if given else ())
        return (None, *(None if g is None else next(made) for g in gradients))


def _copies(
    dtypes: Sequence[torch.dtype], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    made = [
        torch.empty_like(tensor, dtype=dtype, requires_grad=False)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    torch._foreach_copy_(made, list(tensors))
    return tuple(made)
