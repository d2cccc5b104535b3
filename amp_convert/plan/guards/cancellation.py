"""A difference of large, nearly equal values: E[x²] - E[x]², distances, residuals of a fit."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import unit_roundoff
from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.profile.calibrate import Range
from amp_convert.rules.rule_set import GuardLimits


class Cancellation:
    """Where a sum or difference comes out much smaller than what goes in, the rounding of what goes
    in, relative to what comes out, must stay under `cancellation_error`.

    Fires on the difference and on the nodes whose results it reads, since the digits are lost
    there.
    """

    name = "cancellation"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.cancellation_error is False:
            return None
        pairs = [(site.result, c.result) for c in site.feeds if c.facts.is_a(Family.SUM)]
        if site.facts.is_a(Family.SUM):
            pairs += [(operand.range, site.result) for operand in site.operands]
        for large, small in pairs:
            if large is None or small is None or _is_exact(large, dtype):
                continue
            error = large.abs_max * unit_roundoff(dtype)
            if small.abs_max > 0 and not error <= limits.cancellation_error * small.abs_max:
                reason = (
                    f"large values cancel, which leaves an error of {error / small.abs_max:.0%}"
                )
                evidence = f"abs max {large.abs_max:.5g} becomes {small.abs_max:.5g}"
                share = error / small.abs_max
                return GuardFinding(self.name, reason, evidence, share, limits.cancellation_error)
        return None


def _is_exact(range_: Range, dtype: torch.dtype) -> bool:
    return range_.integral and range_.abs_max * unit_roundoff(dtype) <= 1
