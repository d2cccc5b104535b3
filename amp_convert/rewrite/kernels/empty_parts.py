"""Nothing is joined to nothing: `cat([empty, x])` is x.

A model with a cache of keys and values joins them to an empty one at the first call. `cat` leaves a
tensor of shape (0,) away, whatever the other shapes are, and copies the rest.

Keeps: every bit. Where the caller could get the result, or a view of it, the copy stays.
"""

from __future__ import annotations

import torch
from torch import fx

from amp_convert.rewrite.kernels.aliasing import reaches_output

aten = torch.ops.aten


def drop(graph: fx.Graph) -> None:
    """Take empty tensors out of every `cat`, and a `cat` of one tensor out of the graph."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = list(node.args[0])
        full = [part for part in parts if part.meta.get("shape") != (0,)]
        if len(full) == len(parts) or not full:
            continue
        if len({part.meta.get("dtype") for part in parts}) > 1:
            continue  # the empty one may decide the dtype of the result
        if len(full) > 1:
            node.args = (full, *node.args[1:])
        elif not reaches_output(node):
            node.replace_all_uses_with(full[0])
            graph.erase_node(node)
