"""How many products or terms one element of the result is the sum of.

The depth is the product over all reduced axes: input channels times kernel size for a convolution,
the contracted axis for a matrix product, every axis of `dim` for a sum.
"""

from __future__ import annotations

import math

import torch

from amp_convert.plan.guards.site import GuardFinding, Site, ops
from amp_convert.rules.rule_set import GuardLimits

_CONTRACTIONS = ops("linear", "addmm", "mm", "bmm", "baddbmm", "addbmm", "matmul", "mv", "inner")
_CONVOLUTIONS = ops("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
_TRANSPOSED = ops("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_REDUCTIONS = ops(
    "sum",
    "mean",
    "nansum",
    "nanmean",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "prod",
    "logsumexp",
)


class ReductionDepth:
    """The depth of a reduction may be at most `reduction_depth`.

    Kernels accumulate in FP32, so the limit is far out by default; a CUDA kernel that splits a long
    sum may add its parts in low precision.
    """

    name = "reduction-depth"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        depth = reduction_depth(site)
        if limits.reduction_depth is False or depth <= limits.reduction_depth:
            return None
        reason = f"each element sums up more than {limits.reduction_depth:g} terms"
        return GuardFinding(self.name, reason, f"depth {depth}")


def reduction_depth(site: Site) -> int:
    """The number of terms in one element of the result; 1 where nothing is reduced."""
    shapes = {operand.argument: operand.shape for operand in site.operands}
    if site.op in _CONVOLUTIONS:
        weight = shapes.get("weight", ())
        return math.prod(weight[1:])
    if site.op in _TRANSPOSED:
        weight = shapes.get("weight", (1, 1))
        return math.prod((weight[0], *weight[2:]))
    if site.op in _CONTRACTIONS:
        first = next((s for a, s in shapes.items() if a in ("input", "self", "mat1", "batch1")), ())
        if site.op in ("aten.addmm", "aten.baddbmm", "aten.addbmm"):
            first = shapes.get("mat1", shapes.get("batch1", ()))
        batches = first[0] if site.op == "aten.addbmm" and first else 1
        return batches * first[-1] if first else 1
    if site.op in _REDUCTIONS:
        shape = shapes.get("self", shapes.get("input", ()))
        return math.prod(shape[axis] for axis in (site.axes or range(len(shape))))
    return 1
