"""Running sums and products, whose every element carries on what came before."""

from __future__ import annotations

import torch

from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class Cumulative:
    """A cumulative operator may run over at most `cumulative_length` elements."""

    name = "cumulative"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.cumulative_length is False or not site.shape:
            return None
        if not site.facts.is_a(Family.CUMULATIVE):
            return None
        axis = site.axes[0] if site.axes else -1
        length = site.shape[axis]
        if length <= limits.cumulative_length:
            return None
        reason = "it adds up one element after the other, and each keeps the errors before it"
        evidence = f"{length} elements"
        return GuardFinding(self.name, reason, evidence, length, limits.cumulative_length)
