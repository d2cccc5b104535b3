"""How many products or terms one element of the result is the sum of.

The depth is the product over all reduced axes: input channels times kernel size for a convolution,
the contracted axis for a matrix product, every axis of `dim` for a sum.
"""

from __future__ import annotations

import math

import torch

from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


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
        return GuardFinding(self.name, reason, f"depth {depth}", depth, limits.reduction_depth)


def reduction_depth(site: Site) -> int:
    """The number of terms in one element of the result; 1 where nothing is reduced."""
    shapes = {operand.argument: operand.shape for operand in site.operands}
    facts = site.facts
    if facts.is_a(Family.CONVOLUTION):
        weight = shapes.get("weight", ())
        return math.prod(weight[1:])
    if facts.is_a(Family.TRANSPOSED_CONVOLUTION):
        weight = shapes.get("weight", (1, 1))
        return math.prod((weight[0], *weight[2:]))
    if facts.contracted:
        shape = shapes.get(facts.contracted, ())
        # addbmm also adds up its batch.
        batches = shape[0] if facts.name == "aten.addbmm" and shape else 1
        return batches * shape[-1] if shape else 1
    if facts.is_a(Family.REDUCTION):
        shape = shapes.get("self", shapes.get("input", ()))
        return math.prod(shape[axis] for axis in (site.axes or range(len(shape))))
    return 1
