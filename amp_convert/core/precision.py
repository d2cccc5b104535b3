"""How the floating point inputs of one operation are brought to one dtype.

The same law holds where a graph is rewritten and where a plan is applied to a running model.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from amp_convert.core.number_formats import castable


class Precision(StrEnum):
    """How a node's floating point inputs are brought to one dtype.

    ORIGINAL: to what the FP32 model has there. LOW: FP32 becomes the low dtype, except where the
    operator keeps its parameters. FULL: low becomes FP32. WIDEST: to the widest that arrives.
    AS_IS: nothing is cast.
    """

    ORIGINAL = "original"
    LOW = "low"
    FULL = "full"
    WIDEST = "widest"
    AS_IS = "as-is"


def wanted_dtype(
    precision: Precision,
    have: torch.dtype,
    *,
    original: torch.dtype,
    low: torch.dtype,
    kept: bool,
    meets_fp32: bool,
) -> torch.dtype:
    """The dtype that an argument of dtype `have` is to get. `original` is its dtype in the FP32
    model, `kept` whether the operator takes it in FP32 beside low ones, `meets_fp32` whether some
    argument of the call arrives in FP32."""
    if not castable(have) or precision is Precision.AS_IS:
        return have
    if precision is Precision.FULL:
        return torch.float32
    if precision is Precision.WIDEST:
        return torch.float32 if meets_fp32 else have
    if precision is Precision.LOW and original == torch.float32 and not kept:
        return low
    return original
