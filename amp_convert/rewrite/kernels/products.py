"""Linear layers as one matrix product.

`linear` on an input of three dimensions or more folds the leading ones into rows, so that it is one
product; but where the input is not contiguous, or there is no bias, it does so only for a weight
that requires grad. Another weight is expanded and multiplied a sample at a time: 1,107 ms against
33 for one layer of a ViT whose input is transposed, on a CPU. Frozen weights, and cast weights
under `no_grad`, do not require grad. Here the leading dimensions are folded whatever requires grad.

Keeps: the mathematics, but not every bit, since another kernel may add in another order.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def folded_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` of an input of shape (..., in), weight (out, in), as one product of two matrices."""
    rows = input.reshape(-1, input.shape[-1])
    product = torch.nn.functional.linear(rows, weight, bias)
    return product.view(*input.shape[:-1], weight.shape[0])


def fold(graph: fx.Graph) -> None:
    """Fold every linear layer whose input has more than two dimensions."""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        shape = node.args[0].meta.get("shape")
        sizes = node.args[1].meta.get("shape")
        if shape is not None and len(shape) > 2 and sizes is not None and len(sizes) == 2:
            node.target = folded_linear
