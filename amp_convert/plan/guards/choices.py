"""Routers: choices among near-equal values, which rounding takes another way."""

from __future__ import annotations

import math

import torch

from amp_convert.core.number_formats import name_of, unit_roundoff
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class ChoiceError:
    """Rounding the node's result, or what it reads, may change some of the choices that decide what
    the model computes: the experts of a mixture, the codes of a codebook. A changed choice is an
    error as large as the value, so the root of their share, which is their relative L2 error, may
    be `choice_error` roundoffs.

    Fires on what chooses and on what the scores are computed by, up to the product that they come
    from. Rests on trials: see `rounding_trials`.
    """

    name = "choice-error"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.choice_error is False or site.growth is None:
            return None
        share = site.growth.choices
        error = math.sqrt(share) / unit_roundoff(dtype)
        if error <= limits.choice_error:
            return None
        reason = (
            f"rounded to {name_of(dtype)}, it changes {share:.2%} of the choices of "
            f"{site.growth.chooser}"
        )
        evidence = f"{share:.2%} of the choices in {site.batches} batch(es)"
        return GuardFinding(self.name, reason, evidence, error, limits.choice_error)
