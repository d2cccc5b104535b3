"""Casts that nothing is gained by.

The plan casts a value once for each dtype. Where the model's own code casts as well, a value can be
cast twice, or there and back:

1. A cast to the dtype that a value has is the value.
2. A second cast of a value to a dtype is the first.
3. A cast to FP32 of a low value, and back to the same dtype, is the value.
4. A cast of a value that is only repeated (`expand`) is made before it is repeated.

A cast whose result, or a view of it, is returned stays: the caller is to get a tensor of its own.

Takes for granted the dtypes in `meta`. Keeps: every bit, since a low value is an FP32 value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.rewrite.kernels.aliasing import reaches_output

aten = torch.ops.aten


def merge(graph: fx.Graph, *, move: bool = True) -> None:
    """Take out casts, by the rules above; with `move`, move them as well. In training a cast that
    is moved would let a sum of gradients be taken in the lower precision."""
    seen: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        wanted = asked(node)
        if wanted is None:
            continue
        if move:
            _move(graph, node, wanted)
        source: fx.Node = node.args[0]
        if reaches_output(node):
            continue  # the caller is to get a tensor of its own
        if source.meta.get("dtype") == wanted:
            _replace(node, source)
            continue
        inner = asked(source)
        if inner is torch.float32 and wanted in LOW_DTYPES:
            low: fx.Node = source.args[0]  # type: ignore[assignment]
            if low.meta.get("dtype") == wanted:
                _replace(node, low)
                if not source.users:
                    graph.erase_node(source)
                continue
        first = seen.setdefault((source, wanted), node)
        if first is not node:
            _replace(node, first)


def asked(node: fx.Node) -> torch.dtype | None:
    """The dtype that a node casts a tensor of a known dtype to, if it does nothing else."""
    wanted: Any = None
    if node.op != "call_function":
        return None
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        wanted = node.kwargs["dtype"]
    elif node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        wanted = node.args[1]
    known = isinstance(node.args[0], fx.Node) and node.args[0].meta.get("dtype") is not None
    return wanted if known and isinstance(wanted, torch.dtype) else None


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _move(graph: fx.Graph, cast: fx.Node, wanted: torch.dtype) -> None:
    """Rule 4."""
    repeated = cast.args[0]
    assert isinstance(repeated, fx.Node)
    if repeated.target is not aten.expand.default or list(repeated.users) != [cast]:
        return
    source = repeated.args[0]
    if not isinstance(source, fx.Node) or source.meta.get("dtype") in (None, wanted):
        return
    with graph.inserting_before(cast):
        small = graph.call_function(aten._to_copy.default, (source,), {"dtype": wanted})
        again = graph.call_function(aten.expand.default, (small, *repeated.args[1:]))
    small.meta = {"shape": source.meta.get("shape"), "dtype": wanted}
    again.meta = {**repeated.meta, "dtype": wanted}
    cast.args, cast.kwargs, cast.target = (again, wanted), {}, aten.to.dtype  # what rule 1 drops
    graph.erase_node(repeated)
