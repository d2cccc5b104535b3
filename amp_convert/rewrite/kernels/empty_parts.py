"""Nothing is joined to nothing: `cat([empty, x])` is x.

A model with a cache of keys and values joins them to an empty one at the first call. `cat` leaves a
tensor of shape (0,) away, whatever the other shapes are, and copies the rest.

Keeps: every bit. Where the caller could get the result, or a view of it, the copy stays; and in
training a part that could ask for a gradient, which is empty, too.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from amp_convert.rewrite.kernels.aliasing import reaches_output

aten = torch.ops.aten


def drop(graph: fx.Graph, leaves: Collection[fx.Node] = ()) -> None:
    """Take empty tensors out of every `cat`, and a `cat` of one tensor out of the graph. What
    depends on `leaves` may ask for gradients."""
    differentiable: set[fx.Node] = set()
    for node in graph.nodes:
        if node in leaves or not differentiable.isdisjoint(node.all_input_nodes):
            differentiable.add(node)
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = list(node.args[0])
        full = [p for p in parts if p.meta.get("shape") != (0,) or p in differentiable]
        if len(full) == len(parts) or not full:
            continue
        if len({part.meta.get("dtype") for part in parts}) > 1:
            continue  # the empty one may decide the dtype of the result
        if len(full) > 1:
            node.args = (full, *node.args[1:])
        elif not reaches_output(node):
            node.replace_all_uses_with(full[0])
            graph.erase_node(node)
