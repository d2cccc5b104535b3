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
    """The share of a weight's nonzero values that turn subnormal or zero must stay bounded, unless
    rounding all that the product reads is seen to leave each channel of its result as it is: a bias
    of 1e-6 is nothing beside what it is added to.

    Only FP16 has this trap: BF16 has FP32's exponents.
    """

    name = "weight-tiny"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.weight_tiny_share is False or dtype != torch.float16:
            return None
        for operand in site.weights:
            share = operand.range.tiny_share if operand.range is not None else None
            if share is not None and not share <= limits.weight_tiny_share:
                if _is_harmless(site, limits):
                    return None
                return GuardFinding(
                    self.name,
                    f"most of weight {operand.weight} is under 6.1e-05, where float16 loses digits",
                    f"{share:.1%} of its nonzero values",
                    share,
                    limits.weight_tiny_share,
                )
        return None


def _is_harmless(site: Site, limits: GuardLimits) -> bool:
    """Whether the worst channel of the result was tried, and is off by a few roundings at most."""
    channel = site.growth.channel if site.growth is not None else None
    if channel is None or limits.rounding_growth is False:
        return False
    return channel <= limits.rounding_growth
