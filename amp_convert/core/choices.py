"""Which elements does an operator that ranks choose, and which others once its values are rounded?

Of topk and argmax, what is chosen counts, and not in which order; of sort and argsort, which choose
everything, the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


def indices(value: Any) -> list[torch.Tensor]:
    """The indices among an operator's results."""
    leaves = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64]


def changed(node: fx.Node, read: torch.Tensor, want: Any, have: Any) -> int:
    """How many of the indices in `want` are not chosen in `have`. Both are results of `node`, which
    ranks; `read` is what it reads."""
    count = 0
    for mine, other in zip(indices(want), indices(have), strict=False):
        dim = _axis(node)
        if mine.shape != other.shape:
            count += mine.numel()
        elif dim is None or mine.dim() != read.dim() or mine.shape[dim] == read.shape[dim]:
            count += int((mine != other).sum())
        else:
            chosen = [
                torch.zeros_like(read, dtype=torch.bool).scatter_(dim, index, value=True)
                for index in (mine, other)
            ]
            count += int((chosen[0] & ~chosen[1]).sum())
    return count


def _axis(node: fx.Node) -> int | None:
    """The axis that a node ranks along; None where that is all of them."""
    schema = getattr(node.target, "_schema", None)
    given = {}
    if schema is not None:
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    given |= node.kwargs
    dim = given.get("dim")
    return dim if isinstance(dim, int) else None
