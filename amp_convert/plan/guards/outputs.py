"""An output whose values lie close together for their size: a year, a temperature in kelvin."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import name_of, unit_roundoff
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class OutputError:
    """Rounding the node's result may throw the worst channel of an output off by `output_error`
    roundoffs of its own spread. Where years from 2003 to 2007 are predicted, the last bias added
    makes FP16 round to whole years: that addition stays FP32.

    Rests on trials: see `rounding_trials`.
    """

    name = "output-error"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.output_error is False or site.growth is None:
            return None
        error = site.growth.output
        if error <= limits.output_error:
            return None
        share = error * unit_roundoff(dtype)
        reason = (
            f"its result rounded to {name_of(dtype)} throws a channel of the model's outputs off "
            f"by {share:.2g} of what it varies"
        )
        evidence = f"{error:.3g} roundoffs of the channel's spread"
        return GuardFinding(self.name, reason, evidence, error, limits.output_error)
