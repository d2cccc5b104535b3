"""Small steps added to a large value: explicit Euler, running means."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class IncrementLoss:
    """Of the increments that a node adds to a running value, the share `increment_loss` may be
    under half a unit in the last place of it: those leave it as it was, and however many of them
    are added, nothing moves.

    Rests on trials: see `rounding_trials`.
    """

    name = "increment-loss"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.increment_loss is False or site.growth is None:
            return None
        lost = site.growth.lost
        if lost <= limits.increment_loss:
            return None
        reason = (
            f"it adds values to a running value of which {name_of(dtype)} has no unit so small: "
            "they are lost"
        )
        evidence = f"{lost:.1%} of the increments in {site.batches} batch(es)"
        return GuardFinding(self.name, reason, evidence, lost, limits.increment_loss)
