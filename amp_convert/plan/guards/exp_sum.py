"""An exponential that feeds a sum: its largest terms decide, and they carry the largest error."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import unit_roundoff
from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class ExpSum:
    """Where `exp` feeds a sum, the maximum of its exponent may be `exp_growth` in magnitude: so
    much larger is the error of the largest term than that of its exponent, both relative.

    Fires on the exponential and on the nodes that compute its exponent.
    """

    name = "exp-sum"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.exp_growth is False:
            return None
        exponents = [
            c.operand for c in site.reaches if c.facts.is_a(Family.EXPONENTIAL) and c.summed
        ]
        is_exponential = site.facts.is_a(Family.EXPONENTIAL)
        if is_exponential and any(consumer.facts.sums for consumer in site.feeds):
            exponents += [operand.range for operand in site.operands]
        for exponent in exponents:
            if exponent is None:
                continue
            if not abs(exponent.maximum) <= limits.exp_growth:
                error = abs(exponent.maximum) * unit_roundoff(dtype)
                reason = (
                    f"an exponential feeds a sum, whose largest term would be off by {error:.1%}"
                )
                evidence = f"max {exponent.maximum:.5g}"
                size = abs(exponent.maximum)
                return GuardFinding(self.name, reason, evidence, size, limits.exp_growth)
        return None
