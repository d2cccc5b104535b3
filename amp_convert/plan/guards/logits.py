"""Logits: what an exponential turns from an absolute error into a relative one."""

from __future__ import annotations

import torch

from amp_convert.core.number_formats import unit_roundoff
from amp_convert.plan.guards.site import GuardFinding, Site
from amp_convert.rules.rule_set import GuardLimits


class Logits:
    """What becomes the input of a softmax, an exponential or their like may be rounded by
    `logit_error` at most: the magnitude of its maximum times the dtype's unit roundoff.

    A term of a sum that becomes a logit is rounded by its own size only. The limit is an absolute
    error: a logit that is off by 0.25 changes its probability by a quarter. Only the maximum
    counts, since the exponentials of what lies far below it vanish: a mask of -1e9 does not fire.
    """

    name = "logits"

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        if limits.logit_error is False:
            return None
        logits = [
            (consumer.operand, site.result if not consumer.scaled else None)
            for consumer in site.reaches
            if consumer.facts.exponentiates
        ]
        if site.facts.exponentiates:
            logits += [(o.range, None) for o in site.operands if o.argument == "self"]
        for logit, term in logits:
            if logit is None:
                continue
            size = abs(logit.maximum)
            if term is not None and term.abs_max < size:
                size = term.abs_max
            error = size * unit_roundoff(dtype)
            if not error <= limits.logit_error:
                reason = f"it computes logits, the largest of which would be off by {error:.2g}"
                evidence = f"max {logit.maximum:.5g}"
                return GuardFinding(self.name, reason, evidence, error, limits.logit_error)
        return None
