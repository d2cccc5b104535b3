"""An eps that keeps a denominator, a root or a logarithm away from zero, and becomes zero itself.

After OpenVINO's `MarkDivWithEps`, which looks for the same forms: `x / (y + eps)`,
`x / max(y, eps)` and those with a square root between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits

SINGULAR_AT_ZERO = frozenset(
    {
        ("aten.div", "other"), ("aten.true_divide", "other"), ("aten.divide", "other"),
        ("aten.reciprocal", "self"), ("aten.rsqrt", "self"), ("aten.sqrt", "self"),
        ("aten.log", "self"), ("aten.log2", "self"), ("aten.log10", "self"),
        ("aten.addcdiv", "tensor2"), ("aten.pow", "self"), ("aten.atan2", "other"),
    }
)  # fmt: skip


class Epsilon:
    """The constant that keeps a singular operator's input from zero must be a normal number.

    Fires on the node that adds it and on the one that divides, takes the root or the logarithm. It
    asks for no measured zero: what eps is there for need not be among the calibration batches. Only
    FP16 has this trap: BF16 has FP32's exponents.
    """

    name = "epsilon"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.smallest_eps is False or dtype != torch.float16:
            return None
        reason = f"an eps under {limits.smallest_eps:.3g} becomes zero or loses digits in float16"
        for operand in site.operands:
            if (site.op, operand.argument) in SINGULAR_AT_ZERO and _is_tiny(operand.eps, limits):
                return GuardFinding(self.name, reason, f"eps = {operand.eps:g}")
        eps = eps_of(site.op, site.scalars)
        if any((c.op, c.argument) in SINGULAR_AT_ZERO for c in site.feeds) and _is_tiny(
            eps, limits
        ):
            return GuardFinding(self.name, reason, f"eps = {eps:g}")
        return None


def _is_tiny(eps: float | None, limits: GuardLimits) -> bool:
    return eps is not None and 0 < eps < limits.smallest_eps


def eps_of(op: str, scalars: Mapping[str, float]) -> float | None:
    """The least value that an operator with these number arguments leaves a non-negative input."""
    if op in ("aten.add", "aten.maximum"):
        return scalars.get("other")
    if op in ("aten.clamp", "aten.clamp_min"):
        return scalars.get("min")
    return None
