"""Grouped keys and values are not repeated where attention takes them as they are.

Models with fewer heads for keys and values than for queries repeat those (`repeat_kv`) before
attention: a copy of each, as large as the queries. Eager transformers asks for `enable_gqa` instead
where there is no mask. Whether there is one is known at the call alone (see `attention`), so both
ways are kept in one function.

Keeps: the mathematics, and every bit where a kernel repeats for itself, as on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

aten = torch.ops.aten


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: int,
    attn_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention of a query of shape (batch, heads, length, size) and of keys and values with
    `groups` times fewer heads. `options` are those of `scaled_dot_product_attention`."""
    if attn_mask is None:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    key, value = (
        x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])
        for x in (key, value)
    )
    return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)


def group(graph: fx.Graph) -> None:
    """Undo the repetition of keys and values before attention whose mask is told at the call."""
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if len(node.args) != 3 or node.kwargs.get("enable_gqa"):
            continue
        query, *repeated = node.args
        found = [_before_repetition(each) for each in repeated]
        if None in found or len({groups for _, groups in found}) != 1:  # type: ignore[misc]
            continue
        (key, groups), (value, _) = found  # type: ignore[misc]
        node.target, node.args = grouped_attention, (query, key, value, groups)


def _before_repetition(node: object) -> tuple[fx.Node, int] | None:
    """What `repeat_kv` repeats, of shape (batch, heads, length, size), and how often."""
    if not isinstance(node, fx.Node) or node.target is not aten.reshape.default:
        return None
    repeated = node.args[0]
    if isinstance(repeated, fx.Node) and repeated.target is aten.clone.default:
        repeated = repeated.args[0]
    if not isinstance(repeated, fx.Node) or repeated.target is not aten.expand.default:
        return None
    single, sizes = repeated.args[0], repeated.args[1]
    if not isinstance(single, fx.Node) or single.target is not aten.unsqueeze.default:
        return None
    source, place = single.args
    before, after = (n.meta.get("shape") for n in (source, node) if isinstance(n, fx.Node))
    if place != 2 or not isinstance(sizes, list | tuple) or len(sizes) != 5 or not before:
        return None
    groups, heads = sizes[2], before[1]
    if not (isinstance(groups, int) and isinstance(heads, int) and groups > 1):
        return None
    fits = after is not None and after == (before[0], heads * groups, *before[2:])
    return (source, groups) if fits else None  # type: ignore[return-value]
