"""Weights that a cast would change beyond rounding."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class WeightRange:
    """A weight's absolute maximum times head room must stay under the dtype's largest number."""

    name = "weight-range"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.weight_headroom is False:
            return None
        largest = torch.finfo(dtype).max
        for operand in site.weights:
            seen = operand.range
            if seen is None:
                continue
            size = seen.maximum if operand.mask else seen.abs_max
            if not size * limits.weight_headroom <= largest:
                reason = (
                    f"weight {operand.weight} does not fit {name_of(dtype)}, "
                    f"whose largest number is {largest:.5g}"
                )
                evidence, limit = f"abs max {seen.abs_max:.5g}", largest / limits.weight_headroom
                return GuardFinding(self.name, reason, evidence, size, limit)
        return None


class WeightTiny:
    """The share of a weight's nonzero values that turn subnormal or zero must stay bounded.

    Only FP16 has this trap: BF16 has FP32's exponents.
    """

    name = "weight-tiny"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.weight_tiny_share is False or dtype != torch.float16:
            return None
        for operand in site.weights:
            share = operand.range.tiny_share if operand.range is not None else None
            if share is not None and not share <= limits.weight_tiny_share:
                return GuardFinding(
                    self.name,
                    f"most of weight {operand.weight} is under 6.1e-05, where float16 loses digits",
                    f"{share:.1%} of its nonzero values",
                    share,
                    limits.weight_tiny_share,
                )
        return None
