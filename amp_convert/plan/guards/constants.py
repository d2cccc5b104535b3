"""Number arguments that do not survive the cast: masks of -1e9, factors of 1e-8."""

from __future__ import annotations

import math

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits

_OTHER = ("alpha", "dim")


class Constants:
    """A constant must be finite in the low dtype where it is finite, and no smaller than the
    dtype's smallest normal number (which matters to FP16 only)."""

    name = "constant"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.smallest_constant is False or not site.facts.meets_numbers:
            return None
        for argument, value in site.scalars.items():
            if argument in _OTHER or not math.isfinite(value):
                continue
            if value < 0 and site.masked:
                continue
            evidence, largest = f"{argument} = {value:g}", torch.finfo(dtype).max
            if abs(value) > largest:
                reason = f"its constant {argument} is beyond the range of {name_of(dtype)}"
                return GuardFinding(self.name, reason, evidence, value, largest)
            if dtype == torch.float16 and 0 < abs(value) < limits.smallest_constant:
                reason = f"its constant {argument} is too small for {name_of(dtype)}"
                return GuardFinding(self.name, reason, evidence, value, limits.smallest_constant)
        return None
