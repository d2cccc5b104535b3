"""Positions and angles: values whose absolute error counts, however large they are.

A position beyond the dtype's last exact integer falls on its neighbour; an angle is rounded in
proportion to its size, and a sine shows all of that. Rotary embeddings and timestep embeddings
meet both.
"""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of, unit_roundoff
from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class Positions:
    """Integers that were counted (made from integer tensors or ranges, or held in a buffer) must
    stay exact: their rounding may not exceed `position_error` steps."""

    name = "positions"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.position_error is False:
            return None
        seen = [operand.range for operand in site.operands if not operand.mask]
        seen += [] if site.masked else [site.result]
        for range_ in seen:
            if range_ is None or not range_.integral:
                continue
            error = range_.abs_max * unit_roundoff(dtype)
            if not error <= limits.position_error:
                reason = f"it counts beyond {name_of(dtype)}'s exact integers"
                evidence = site.measured(range_)
                return GuardFinding(self.name, reason, evidence, error, limits.position_error)
        return None


class Angles:
    """What becomes the angle of a sine or cosine may be rounded by `angle_error` radians at most:
    the largest angle times the dtype's unit roundoff."""

    name = "angles"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.angle_error is False:
            return None
        angles = [
            c.operand for c in site.reaches if c.facts.is_a(Family.PERIODIC) and c.argument != "abs"
        ]
        if site.facts.is_a(Family.PERIODIC):
            angles += [operand.range for operand in site.operands if operand.argument != "abs"]
        for angle in angles:
            error = angle.abs_max * unit_roundoff(dtype) if angle is not None else 0.0
            if angle is not None and not error <= limits.angle_error:
                reason = f"it computes angles, which would be off by {error:.2g} radians"
                evidence = site.measured(angle)
                return GuardFinding(self.name, reason, evidence, error, limits.angle_error)
        return None
