"""Activations that leave the low dtype's range, above or below."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.core.op_facts import Family
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.profile.range_probes import LARGER, SPIKE
from amp_convert.rules.rule_set import GuardLimits


class ActivationRange:
    """The calibrated absolute maximum of the node's result and of its inputs, times head room,
    must stay under the dtype's largest number.

    A power grows faster than its input: there the head room is raised to the exponent, so that it
    is that of the input. Of a mask only the largest value counts: the others are clamped.
    """

    name = "activation-range"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.activation_headroom is False:
            return None
        largest = torch.finfo(dtype).max
        exponent = 1.0
        if site.facts.is_a(Family.POWER):  # a square has no argument for it
            exponent = site.scalars.get("exponent", 2.0)
        growth = min(max(abs(exponent), 1.0), 100.0)
        headroom = limits.activation_headroom
        seen = [("its result", site.result, headroom**growth, site.masked)]
        seen += [("an input", o.range, headroom, o.mask) for o in site.activations]
        for what, range_, headroom, mask in seen:
            if range_ is None:
                continue
            size = range_.maximum if mask else range_.abs_max
            if not size * headroom <= largest:
                reason = (
                    f"{what} comes too near to the largest {name_of(dtype)} number, "
                    f"{largest:.5g} (head room {headroom:g})"
                )
                return GuardFinding(
                    self.name, reason, site.measured(range_), size, largest / headroom
                )
        return None


class ProbedRange:
    """The largest finite magnitude on inputs unlike those of calibration (see
    `profile.range_probes`), times head room, must stay under the dtype's largest number."""

    name = "probed-range"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.probe_headroom is False:
            return None
        limit = torch.finfo(dtype).max / limits.probe_headroom
        seen = [("its result", site.result, site.masked)]
        seen += [("an input", operand.range, operand.mask) for operand in site.activations]
        for what, range_, mask in seen:
            if range_ is None or range_.probed is None:
                continue
            size = range_.probed.maximum if mask else range_.probed.abs_max
            if not size <= limit:
                reason = (
                    f"on inputs {LARGER:g} times larger than those of calibration, or with a value "
                    f"of {SPIKE:g}, {what} passes the largest {name_of(dtype)} number "
                    "(probe_headroom = false in [guards] allows that)"
                )
                evidence = f"abs max {size:.5g} there, {site.measured(range_)}"
                return GuardFinding(self.name, reason, evidence, size, limit)
        return None


class ActivationFloor:
    """A value that is nowhere as large as the dtype's smallest normal number loses digits, or
    vanishes. Only FP16 has this trap: BF16 has FP32's exponents.
    """

    name = "activation-floor"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.activation_floor is False or dtype != torch.float16:
            return None
        seen = [("its result", site.result)]
        seen += [("an input", operand.range) for operand in site.activations]
        for what, range_ in seen:
            if range_ is not None and 0 < range_.abs_max < limits.activation_floor:
                reason = f"{what} is nowhere above {limits.activation_floor:.3g}: float16 loses it"
                return GuardFinding(
                    self.name,
                    reason,
                    site.measured(range_),
                    range_.abs_max,
                    limits.activation_floor,
                )
        return None
