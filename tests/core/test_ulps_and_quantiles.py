"""Distances in units in the last place, and quantiles of errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from amp_convert.core.tensor_errors import Quantiles, RoundingSums
from tests.core.pairs import Pairs, any_float, pairs_of, tensors
from tests.core.pairs import small_chunks as small_chunks

ordinary = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def steps_between(a: float, b: float, limit: int = 200) -> int:
    """FP16 numbers from a to b, walked one at a time: 0 and -0 are one number."""
    low, high = sorted((np.float16(a), np.float16(b)))
    for count in range(limit):
        if low >= high:
            return count
        low = np.nextafter(low, np.float16(np.inf))
    raise AssertionError("too far to walk")


near = st.integers(-60, 60)


start = st.floats(-65504, 65504, width=16)


# --- rounding ------------------------------------------------------------------------------------


@given(start, near)
def test_ulp_distance_is_the_number_of_steps(x: float, steps: int) -> None:
    value = np.float16(x)
    with np.errstate(over="ignore"):
        for _ in range(abs(steps)):
            value = np.nextafter(value, np.float16(math.copysign(np.inf, steps)))
    assume(np.isfinite(value))
    sums = RoundingSums(torch.float16)
    sums.add(torch.tensor([x]), torch.tensor([float(value)]).half())
    assert sums.max_ulp == steps_between(x, float(value))


def test_zero_has_no_sign() -> None:
    """A tiny negative reference rounds to -0, which is as good as 0."""
    sums = RoundingSums(torch.float16)
    sums.add(torch.tensor([-1e-12, 0.0]), torch.tensor([0.0, -0.0]).half())
    assert sums.max_ulp == 0


def test_ulps_of_bfloat16() -> None:
    one = torch.tensor([1.0, 1.0, -2.0])
    sums = RoundingSums(torch.bfloat16)
    sums.add(one, torch.tensor([1.0, 1.0 + 3 * 2**-7, -2.0 - 5 * 2**-6]).bfloat16())
    assert sums.max_ulp == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_correct_rounding_is_no_distance(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000) * 10 ** torch.linspace(-6, 4, 1000)
    sums = RoundingSums(dtype)
    sums.add(x, x.to(dtype))
    assert sums.max_ulp == 0
    assert 0 < sums.errors.rel_l2 <= torch.finfo(dtype).eps / 2


def test_a_result_in_fp32_is_judged_on_the_low_grid() -> None:
    sums = RoundingSums(torch.float16)
    sums.add(torch.tensor([1.0, 3.0]), torch.tensor([1.0 + 2**-10, 3.0]))
    assert sums.max_ulp == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_not_finite_has_no_distance(poison: float) -> None:
    sums = RoundingSums(torch.float16)
    sums.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, poison]).half())
    sums.add(torch.tensor([1.0]), torch.tensor([1.0]).half())
    assert math.isnan(sums.max_ulp)


def test_what_has_no_reference_has_no_distance() -> None:
    sums = RoundingSums(torch.float16)
    sums.add(torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([5.0, math.inf, 1.0]).half())
    assert sums.max_ulp == 0


@given(pairs_of(any_float))
def test_underflow_is_what_became_zero(pairs: Pairs) -> None:
    reference, value = tensors(pairs)
    rounded = value.half()
    sums = RoundingSums(torch.float16)
    sums.add(reference, rounded)
    lost = np.count_nonzero((rounded.numpy() == 0) & (reference.numpy() != 0))
    assert sums.underflow_fraction == (lost / len(pairs) if pairs else 0.0)


SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)


# --- quantiles -----------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=60))
def test_quantiles_are_right_to_within_a_bin(errors: list[float]) -> None:
    value = torch.tensor(errors, dtype=torch.float32)
    quantiles = Quantiles()
    quantiles.add(torch.zeros_like(value), value)
    ordered = np.sort(value.double().numpy())
    for share in SHARES:
        exact = float(ordered[math.ceil(share * len(ordered)) - 1])
        assert exact <= quantiles.at(share) <= exact * 1.008


@given(pairs_of(ordinary), pairs_of(ordinary))
@settings(max_examples=50)
def test_quantiles_of_batches(first: Pairs, second: Pairs) -> None:
    assume(first or second)
    together, apart = Quantiles(), Quantiles()
    together.add(*tensors(first + second))
    for pairs in (first, second):
        apart.add(*tensors(pairs))
    assert [together.at(s) for s in SHARES] == [apart.at(s) for s in SHARES]
    assert [together.at(s) for s in SHARES] == sorted(together.at(s) for s in SHARES)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_errors_beyond_all_bounds_are_infinite(poison: float) -> None:
    quantiles = Quantiles()
    quantiles.add(torch.full((4,), -3e38), torch.tensor([-3e38, -3e38, -3e38, poison]))
    assert quantiles.at(0.5) == 0
    assert quantiles.at(0.9) == math.inf
