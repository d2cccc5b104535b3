"""The streaming measures against plain FP64 NumPy over whole arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from amp_convert.core import tensor_errors as error_metrics
from amp_convert.core.tensor_errors import ErrorSums, Quantiles, RoundingSums, chunks, larger

Array = NDArray[np.float64]
Pairs = list[tuple[float, float]]
"""Elements of a reference, each with the value to compare with it."""

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, 65504.0, 6e-8, 1.0]
any_float = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def pairs_of(element: st.SearchStrategy[float]) -> st.SearchStrategy[Pairs]:
    """Pairs of reference and value; half of them equal, as most elements of a tensor nearly are."""
    equal = element.map(lambda x: (x, x))
    return st.lists(st.one_of(st.tuples(element, element), equal), max_size=40)


def tensors(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """So small that every tensor here is cut into several."""
    before, error_metrics.CHUNK = error_metrics.CHUNK, 7
    yield
    error_metrics.CHUNK = before


def added(pairs: Pairs) -> ErrorSums:
    sums = ErrorSums()
    sums.add(*tensors(pairs))
    return sums


def arrays(pairs: Pairs) -> tuple[Array, Array]:
    reference, value = tensors(pairs)
    return reference.double().numpy(), value.double().numpy()


# --- error sums ----------------------------------------------------------------------------------


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


# --- rounding ------------------------------------------------------------------------------------


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


# --- quantiles -----------------------------------------------------------------------------------

SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)


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
