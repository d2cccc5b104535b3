"""A slice of the whole is the whole.

`x[:, 0]` is one view in eager. A trace writes `:` out as a slice from the first element to the
last: a view that costs nothing forward, and in the backward pass a tensor of zeros and a copy.

Keeps: every bit, and whose memory a value is. A slice that is returned stays: the caller is to get
a tensor of its own.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_LAST = 2**63 - 1
"""What a trace writes for an end that was left out."""


def drop(graph: fx.Graph) -> None:
    """Let the whole stand for every slice of it."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        source, dim, start, end, step = _arguments(node)
        if start not in (None, 0) or step != 1 or any(user.op == "output" for user in node.users):
            continue
        shape = source.meta.get("shape")
        size = shape[dim] if shape is not None and isinstance(dim, int) else None
        if end in (None, _LAST) or (isinstance(end, int) and isinstance(size, int) and end >= size):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _arguments(node: fx.Node) -> tuple[fx.Node, object, object, object, object]:
    names = ("self", "dim", "start", "end", "step")
    default = {"dim": 0, "start": None, "end": None, "step": 1}
    given = default | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return tuple(given[name] for name in names)  # type: ignore[return-value]
