"""A rounding error that grows: an offset that a normalisation takes off, digits that cancel, many
tiny terms of a sum. Unlike the guards that look at ranges, it rests on trials: see
`rounding_trials`."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of, unit_roundoff
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class RoundingGrowth:
    """What the node reads, and its own result where others read it, may be rounded if that throws
    no result off by more than `rounding_growth` times the dtype's unit roundoff (relative L2).

    Fires on the node whose result is thrown off, and on those whose rounded results do it, however
    many nodes lie between.
    """

    name = "rounding-growth"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.rounding_growth is False or site.growth is None:
            return None
        rounded, growth = f"rounded to {name_of(dtype)}", site.growth
        if not growth.result <= limits.rounding_growth:
            off = _share(growth.result, dtype)
            reason = f"its result {rounded} throws {growth.reader} off by {off}"
            return _finding(reason, growth.result, limits.rounding_growth, site)
        if not growth.inputs <= limits.rounding_growth:
            reason = f"its inputs {rounded} throw it off by {_share(growth.inputs, dtype)}"
            return _finding(reason, growth.inputs, limits.rounding_growth, site)
        return None


def _share(growth: float, dtype: torch.dtype) -> str:
    return f"{growth * unit_roundoff(dtype):.2g} (relative L2)"


def _finding(reason: str, growth: float, limit: float, site: Site) -> GuardFinding:
    batches = f"{site.batches} batch" if site.batches == 1 else f"{site.batches} batches"
    evidence = f"the rounding error grows {growth:.3g} times in {batches}"
    return GuardFinding(RoundingGrowth.name, reason, evidence, growth, limit)
