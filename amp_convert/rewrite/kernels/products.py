"""Linear layers as one matrix product: see `core.folded_linear`, whose form each gets here,
whatever requires grad.

Keeps: the mathematics, but not every bit, since another kernel may add in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from amp_convert.core.folded_linear import folded_linear

aten = torch.ops.aten


def fold(graph: fx.Graph) -> None:
    """Fold every linear layer that `kernel_of` says is to be."""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        node.target = kernel_of(node)


def kernel_of(node: fx.Node) -> Any:
    """What computes a node: for a linear layer whose input has more than two dimensions, and a last
    one of some length, the folded form; a bias that is no vector is added as it broadcasts."""
    if node.target is not aten.linear.default:
        return node.target
    shapes: list[Any] = [n.meta.get("shape") for n in node.all_input_nodes]
    if None in shapes or [len(shape) for shape in shapes[1:]] not in ([2], [2, 1]):
        return node.target
    folds = len(shapes[0]) > 2 and isinstance(shapes[0][-1], int) and shapes[0][-1] > 0
    return folded_linear if folds else node.target
