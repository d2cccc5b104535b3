"""Limits of the low dtypes, against NumPy's and worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amp_convert.core.number_formats import ulp_at


@pytest.mark.parametrize("value", [0.0, 1e-8, 6e-5, 6.2e-5, 0.3, 1.0, 1.999, 2.0, -3.35, 40000.0])
def test_ulp_in_fp16_is_numpys_spacing(value: float) -> None:
    """NumPy gives the distance for the number itself: only for one that FP16 has."""
    rounded = np.float16(value)
    below = rounded if abs(rounded) <= abs(value) else np.nextafter(rounded, np.float16(0))
    assert ulp_at(torch.float16, value) == float(np.spacing(abs(below)))


@pytest.mark.parametrize(("value", "ulp"), [(1.0, 2.0**-7), (3.9, 2.0**-6), (1e38, 2.0**119)])
def test_ulp_in_bf16(value: float, ulp: float) -> None:
    assert ulp_at(torch.bfloat16, value) == ulp


def test_what_is_not_finite_has_no_ulp() -> None:
    assert ulp_at(torch.float16, math.inf) == math.inf
    assert math.isnan(ulp_at(torch.float16, math.nan))
