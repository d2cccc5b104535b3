"""An eps that keeps a denominator, a root or a logarithm away from zero, and becomes zero itself.

After OpenVINO's `MarkDivWithEps`, which looks for the same forms: `x / (y + eps)`,
`x / max(y, eps)` and those with a square root between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amp_convert.core.op_facts import facts_of
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


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
            if operand.argument == site.facts.singular and _is_tiny(operand.eps, limits):
                return GuardFinding(self.name, reason, f"eps = {operand.eps:g}")
        eps = eps_of(site.op, site.scalars)
        if any(consumer.is_singular for consumer in site.feeds) and _is_tiny(eps, limits):
            return GuardFinding(self.name, reason, f"eps = {eps:g}")
        return None


def _is_tiny(eps: float | None, limits: GuardLimits) -> bool:
    return eps is not None and 0 < eps < limits.smallest_eps


def eps_of(op: str, scalars: Mapping[str, float]) -> float | None:
    """The least value that an operator with these number arguments leaves a non-negative input."""
    return scalars.get(facts_of(op).lower_bound)
