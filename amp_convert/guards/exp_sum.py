"""An exponential that feeds a sum: its largest terms decide, and they carry the largest error."""

from __future__ import annotations

import torch

from amp_convert.dtypes import unit_roundoff
from amp_convert.guards.site import Finding, Site, ops
from amp_convert.rules import Guards

EXPONENTIALS = ops("exp", "exp2", "expm1")
SUMS = ops("sum", "mean", "cumsum", "matmul", "bmm", "mm", "logsumexp", "einsum")


class ExpSum:
    """Where `exp` feeds a sum, its largest term may not be off by more than the share `exp_error`:
    what rounding the exponent leaves, the magnitude of its maximum times the dtype's unit roundoff.

    Fires on the exponential and on the nodes that compute its exponent.
    """

    name = "exp-sum"

    def find(self, site: Site, limits: Guards, dtype: torch.dtype) -> Finding | None:
        if limits.exp_error is False:
            return None
        exponents = [c.operand for c in site.reaches if c.op in EXPONENTIALS and c.summed]
        if site.op in EXPONENTIALS and any(consumer.op in SUMS for consumer in site.feeds):
            exponents += [operand.range for operand in site.operands]
        for exponent in exponents:
            if exponent is None:
                continue
            error = abs(exponent.maximum) * unit_roundoff(dtype)
            if not error <= limits.exp_error:
                reason = (
                    f"an exponential feeds a sum, whose largest term would be off by {error:.1%}"
                )
                return Finding(self.name, reason, f"max {exponent.maximum:.5g}")
        return None
