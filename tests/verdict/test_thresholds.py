"""Defaults by dtype, and numbers that would let anything pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from amp_convert.core.errors import UsageError
from amp_convert.verdict.thresholds import metric_limit, rounding_unit
from amp_convert.verdict.verdict import Thresholds
from tests.evidence import FP16, divergence, output, verdict

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_unit_is_half_of_torch_s_eps(dtype: str) -> None:
    assert rounding_unit(dtype) == torch.finfo(getattr(torch, dtype)).eps / 2


@pytest.mark.parametrize("value", [NAN, INF, -1e-3])
@pytest.mark.parametrize(
    "name",
    [
        "output_rel_l2",
        "cosine",
        "autocast_factor",
        "agreement",
        "metric_tolerance",
        "gradient_rel_l2",
        "gradient_zeroed",
        "loss_tolerance",
    ],
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


def test_the_limits_of_training_depend_on_the_dtype() -> None:
    half, brain = (Thresholds.for_dtype(name) for name in ("float16", "bfloat16"))
    assert (half.gradient_rel_l2, half.loss_tolerance, half.gradient_zeroed) == (0.1, 0.01, 0.1)
    assert (brain.gradient_rel_l2, brain.loss_tolerance, brain.gradient_zeroed) == (0.3, 0.02, 0.1)


def test_where_nothing_is_converted_nothing_is_allowed() -> None:
    exact = FP16.exact()
    allowed = (exact.output_rel_l2, exact.gradient_rel_l2, exact.gradient_zeroed)
    assert (*allowed, exact.loss_tolerance) == (0, 0, 0, 0)
    assert exact.metric_tolerance == FP16.metric_tolerance


@pytest.mark.parametrize(
    ("reference", "spread", "lower", "limit"),
    [
        (0.5, 0.0, False, 0.45),
        (0.5, 0.0, True, 0.55),
        (-0.5, 0.0, False, -0.55),
        (0.0, 0.0, True, 0.0),
        (0.002, 0.0, True, 0.0022),
        (0.002, 0.01, True, 0.003),
    ],
)
def test_the_worst_value_that_a_metric_may_have(
    reference: float, spread: float, lower: bool, limit: float
) -> None:
    found = metric_limit(reference, 0.1, lower_is_better=lower, spread=spread)
    assert found == pytest.approx(limit)
