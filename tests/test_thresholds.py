"""Defaults by dtype, and numbers that would let anything pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from amp_convert.errors import UsageError
from amp_convert.thresholds import rounding_unit
from amp_convert.verdict import Thresholds
from tests.evidence import FP16, divergence, output, verdict

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_unit_is_half_of_torch_s_eps(dtype: str) -> None:
    assert rounding_unit(dtype) == torch.finfo(getattr(torch, dtype)).eps / 2


@pytest.mark.parametrize("value", [NAN, INF, -1e-3])
@pytest.mark.parametrize(
    "name", ["output_rel_l2", "cosine", "autocast_factor", "agreement", "metric_tolerance"]
)
def test_a_threshold_that_would_pass_anything_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"{name} is {value}"):
        replace(FP16, **{name: value})


def test_another_dtype_has_no_thresholds() -> None:
    with pytest.raises(UsageError, match="'float64' is not a low dtype"):
        Thresholds.for_dtype("float64")


def test_one_tolerance_is_enough_to_accept_a_less_exact_model() -> None:
    # An error of relative size r at a right angle to the reference has this cosine.
    rel_l2 = 0.3
    cosine = 1 / math.sqrt(1 + rel_l2**2)
    run = divergence(
        outputs=(output(rel_l2=rel_l2, cosine=cosine, max_abs_err=1.0),), autocast_outputs=()
    )
    assert verdict(run).status == "fail"
    loose = Thresholds.for_dtype("float16", output_rel_l2=rel_l2)
    assert verdict(run, thresholds=loose).status == "pass"
    tight = Thresholds.for_dtype("float16", output_rel_l2=1e-3)
    assert tight.cosine == FP16.cosine
