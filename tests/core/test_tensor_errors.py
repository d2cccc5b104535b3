"""The streaming measures against plain FP64 NumPy over whole arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from amp_convert.core import tensor_errors as error_metrics
from amp_convert.core.tensor_errors import ErrorSums, Quantiles, RoundingSums, chunks, larger
from tests.core.pairs import Pairs, any_float, pairs_of, tensors
from tests.core.pairs import small_chunks as small_chunks

Array = NDArray[np.float64]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


ordinary = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def added(pairs: Pairs) -> ErrorSums:
    sums = ErrorSums()
    sums.add(*tensors(pairs))
    return sums


def arrays(pairs: Pairs) -> tuple[Array, Array]:
    reference, value = tensors(pairs)
    return reference.double().numpy(), value.double().numpy()


def comparable(reference: Array, value: Array) -> tuple[Array, Array]:
    """Reference and difference of what can be compared, after the module's own definition."""
    with np.errstate(invalid="ignore"):
        difference = value - reference
    keep = ~np.isnan(reference) & ~(np.isinf(reference) & (value == reference))
    return reference[keep], difference[keep]


def rel_l2(reference: Array, value: Array) -> float:
    want, difference = comparable(reference, value)
    error, norm = np.linalg.norm(difference), np.linalg.norm(want)
    if norm == 0:
        return 0.0 if error == 0 else error if np.isnan(error) else math.inf
    with np.errstate(invalid="ignore"):
        return float(error / norm)


def same(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-12, abs=0, nan_ok=True)


@given(pairs_of(any_float))
def test_relative_l2_and_sqnr(pairs: Pairs) -> None:
    sums, expected = added(pairs), rel_l2(*arrays(pairs))
    assert same(sums.rel_l2, expected)
    if expected == 0:
        assert sums.sqnr_db == math.inf
    else:
        # Near a relative error of 1 the logarithm cancels: what is left is an absolute error.
        decibels = pytest.approx(-20 * np.log10(expected), rel=1e-12, abs=1e-10, nan_ok=True)
        assert sums.sqnr_db == decibels


@given(pairs_of(any_float))
def test_largest_error_and_largest_reference(pairs: Pairs) -> None:
    sums = added(pairs)
    want, difference = comparable(*arrays(pairs))
    assert same(sums.max_abs, float(np.abs(difference).max(initial=0)))
    assert same(sums.ref_abs_max, float(np.abs(want).max(initial=0)))


@given(pairs_of(any_float))
def test_counts(pairs: Pairs) -> None:
    sums = added(pairs)
    reference, value = arrays(pairs)
    finite_reference = np.isfinite(reference)
    assert sums.elements == len(pairs)
    assert sums.ref_nonfinite == np.count_nonzero(~finite_reference)
    assert sums.nonfinite == np.count_nonzero(finite_reference & ~np.isfinite(value))
    overflow = np.count_nonzero(finite_reference & np.isinf(value))
    assert sums.overflow_fraction == (overflow / len(pairs) if pairs else 0.0)


@given(pairs_of(finite))
def test_cosine(pairs: Pairs) -> None:
    reference, value = arrays(pairs)
    norms = np.linalg.norm(reference), np.linalg.norm(value)
    # The value's norm comes from sums about the reference: it needs one of a like size.
    assume(norms[0] == norms[1] == 0 or 1e-3 * norms[0] < norms[1] < 1e3 * norms[0])
    expected = float(reference @ value / norms[0] / norms[1]) if norms[0] else 1.0
    assert added(pairs).cosine == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("reference", "value", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 2.0], [2.0, 4.0], 1.0),
        ([1.0, 2.0], [-1.0, -2.0], -1.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0),
    ],
)
def test_cosine_of_hand_made_cases(
    reference: list[float], value: list[float], expected: float
) -> None:
    assert added(list(zip(reference, value, strict=True))).cosine == pytest.approx(expected)


MEASURES: list[Callable[[ErrorSums], float]] = [
    lambda sums: sums.rel_l2,
    lambda sums: sums.max_abs,
    lambda sums: sums.cosine,
    lambda sums: -sums.sqnr_db,
]


@given(pairs_of(finite), st.integers(0, 40), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_value_that_is_not_finite_never_gives_a_finite_error(
    pairs: Pairs, place: int, poison: float
) -> None:
    """And none that a tolerance from above, or from below for the cosine, would admit."""
    pairs.insert(place, (1.0, poison))
    sums = added(pairs)
    for measure in MEASURES:
        assert not math.isfinite(measure(sums))
    assert not sums.rel_l2 < 1e300
    assert not sums.cosine > -1


def test_equal_infinities_and_nans_of_the_reference() -> None:
    sums = added([(math.inf, math.inf), (-math.inf, -math.inf), (math.nan, 5.0), (2.0, 2.5)])
    assert sums.rel_l2 == 0.25
    assert (sums.elements, sums.ref_nonfinite, sums.nonfinite) == (4, 3, 0)
    assert not math.isfinite(added([(math.inf, -math.inf)]).rel_l2)
    assert not math.isfinite(added([(math.inf, 1.0)]).rel_l2)


@given(pairs_of(any_float), st.integers(1, 50))
@settings(max_examples=50)
def test_cutting_makes_no_difference(pairs: Pairs, size: int) -> None:
    want = added(pairs)
    before, error_metrics.CHUNK = error_metrics.CHUNK, size
    try:
        have = added(pairs)
    finally:
        error_metrics.CHUNK = before
    for measure in MEASURES:
        assert measure(have) == pytest.approx(measure(want), rel=1e-9, abs=1e-9, nan_ok=True)
    assert (have.max_abs, have.nonfinite) == pytest.approx(
        (want.max_abs, want.nonfinite), nan_ok=True
    )
    assert (have.elements, have.ref_nonfinite) == (want.elements, want.ref_nonfinite)


@given(pairs_of(ordinary), pairs_of(ordinary))
@settings(max_examples=50)
def test_batches_add_up(first: Pairs, second: Pairs) -> None:
    sums = added(first)
    sums.add(*tensors(second))
    assert same(sums.rel_l2, rel_l2(*arrays(first + second)))


def test_empty_tensors() -> None:
    sums, rounding, quantiles = ErrorSums(), RoundingSums(torch.float16), Quantiles()
    for measure in (sums, rounding, quantiles):
        measure.add(torch.ones(0, 3), torch.ones(0, 3, dtype=torch.float16))
    assert (sums.elements, sums.rel_l2, sums.cosine, sums.max_abs) == (0, 0.0, 1.0, 0.0)
    assert (sums.overflow_fraction, sums.sqnr_db) == (0.0, math.inf)
    assert (rounding.max_ulp, rounding.underflow_fraction) == (0.0, 0.0)
    assert math.isnan(quantiles.at(0.5))


@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "permuted", "one of them", "sliced"]
)
def test_layout_in_memory_makes_no_difference(layout: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    want = ErrorSums()
    want.add(a, b)
    if layout == "transposed":
        a, b = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (a, b))
    elif layout == "permuted":
        a, b = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (a, b))
    elif layout == "one of them":
        a = a.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "sliced":
        a, b = (torch.stack([t, t], -1)[..., 0] for t in (a, b))
    have = ErrorSums()
    have.add(a, b)
    assert same(have.rel_l2, want.rel_l2)
    assert same(have.cosine, want.cosine)
    assert have.max_abs == want.max_abs


def test_broadcast_memory() -> None:
    """Expanded tensors share their elements in memory, and count as many as they show."""
    a, b = torch.tensor([[1.0], [2.0]]).expand(2, 50), torch.tensor([[1.0], [4.0]]).expand(2, 50)
    sums = ErrorSums()
    sums.add(a, b)
    assert sums.elements == 100
    assert sums.rel_l2 == pytest.approx(math.sqrt(4 / 5))
    assert sum(len(want) for want, _ in chunks(a, b)) == 100


def test_gradients_are_no_hindrance() -> None:
    a = torch.ones(3, requires_grad=True)
    sums = ErrorSums()
    sums.add(a * 2, a * 3)
    assert sums.rel_l2 == 0.5


def test_larger() -> None:
    assert larger(1.0, 2.0) == larger(2.0, 1.0) == 2.0
    assert larger(1.0, math.inf) == math.inf
    assert math.isnan(larger(math.nan, 1.0))
    assert math.isnan(larger(1.0, math.nan))
