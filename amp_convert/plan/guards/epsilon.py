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
        for operand in site.operands:
            if operand.argument == site.facts.singular:
                found = _finding(operand.eps, limits.smallest_eps)
                if found is not None:
                    return found
        eps = eps_of(site.op, site.scalars)
        feeds = any(consumer.is_singular for consumer in site.feeds)
        return _finding(eps, limits.smallest_eps) if feeds else None


def _finding(eps: float | None, smallest: float) -> GuardFinding | None:
    if eps is None or not 0 < eps < smallest:
        return None
    reason = f"an eps under {smallest:.3g} becomes zero or loses digits in float16"
    return GuardFinding(Epsilon.name, reason, f"eps = {eps:g}", eps, smallest)


def eps_of(op: str, scalars: Mapping[str, float]) -> float | None:
    """The least value that an operator with these number arguments leaves a non-negative input."""
    return scalars.get(facts_of(op).lower_bound)
