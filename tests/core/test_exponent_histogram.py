"""Histograms of exponents and the loss scale that they ask for, against values worked out by hand
and against Python's own frexp."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.core.errors import UsageError
from amp_convert.core.exponent_histogram import Exponents, ScaleAdvice, log2, recommend_scale
from amp_convert.core.tensor_errors import CHUNK

SCALES = [2.0**k for k in (0, 1, 7, 16, 24)]
numbers = st.lists(st.floats(width=32), max_size=40)
ordinary = st.lists(
    st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-60),
    max_size=40,
)


def seen(*values: float, dtype: torch.dtype = torch.float32) -> Exponents:
    exponents = Exponents()
    exponents.add(torch.tensor(values, dtype=dtype))
    return exponents


# --- histograms ----------------------------------------------------------------------------------


def test_a_histogram_worked_out_by_hand() -> None:
    below = math.nextafter(2.0**-24, 0)  # in FP32 it is the number 2**-24 again, in FP64 it is not
    values = (0.0, -0.0, 1.0, 1.5, -2.0, 3.999, 2.0**-24, below, 2.0**-149, math.inf, -math.inf)
    found = seen(*values).histogram()
    assert dict(found.counts) == {-149: 1, -24: 2, 0: 2, 1: 2}
    assert (found.elements, found.zeros, found.nonfinite) == (11, 2, 2)
    assert found.abs_max == math.inf
    assert seen(*values, dtype=torch.float64).histogram().counts[-25] == 1


def test_shares_worked_out_by_hand() -> None:
    found = seen(0.0, 2.0**-30, 2.0**-25, 1.5 * 2.0**-24, 2.0**-15, 1.0).histogram()
    assert found.share_under(-24) == 2 / 5  # zeros are no loss
    assert found.share_under(-14) == 4 / 5
    assert found.share_under(-24, 2.0) == 1 / 5
    assert found.share_under(-24, 2.0**16) == 0
    assert found.share_under(-14, 2.0**16) == 0  # 2**-30 becomes 2**-14, which is normal
    assert found.share_under(-14, 2.0**15) == 1 / 5


def test_without_nonzero_values_there_is_no_share() -> None:
    assert seen(0.0, 0.0, math.nan).histogram().share_under(-24) is None
    assert Exponents().histogram().share_under(-24) is None


def test_nan_is_counted_and_spoils_the_maximum() -> None:
    found = seen(1.0, math.nan, 2.0).histogram()
    assert found.nonfinite == 1
    assert math.isnan(found.abs_max)


@given(numbers)
def test_every_value_is_counted_once_and_rightly(values: list[float]) -> None:
    found = seen(*values).histogram()
    assert found.zeros + found.nonfinite + sum(found.counts.values()) == found.elements
    finite = [v for v in values if v != 0 and math.isfinite(v)]
    assert dict(found.counts) == dict(Counter(math.frexp(v)[1] - 1 for v in finite))
    assert found.nonfinite == sum(not math.isfinite(v) for v in values)


@given(ordinary, st.integers(-40, 40))
def test_a_power_of_two_moves_the_histogram(values: list[float], power: int) -> None:
    plain = seen(*values).histogram()
    moved = seen(*(v * 2.0**power for v in values)).histogram()
    assert dict(moved.counts) == {e + power: n for e, n in plain.counts.items()}
    assert (moved.zeros, moved.abs_max) == (plain.zeros, plain.abs_max * 2.0**power)


@given(ordinary, st.integers(-40, 20), st.sampled_from(SCALES))
def test_the_share_is_that_of_the_values(values: list[float], limit: int, scale: float) -> None:
    share = seen(*values).histogram().share_under(limit, scale)
    nonzero = [v for v in values if v]
    under = sum(abs(v) * scale < 2.0**limit for v in nonzero)
    assert share == (under / len(nonzero) if nonzero else None)


@given(numbers, numbers)
def test_merging_is_seeing_both(one: list[float], other: list[float]) -> None:
    both, joined = seen(*one), seen(*one, *other)
    both.merge(seen(*other))
    assert both.counts == joined.counts
    assert both.abs_max == pytest.approx(joined.abs_max, nan_ok=True)
    counts = [(e.elements, e.zeros, e.nonfinite) for e in (both, joined)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(30, 40).to(dtype)
    want = seen(*tensor.flatten().tolist(), dtype=torch.float64).histogram()
    for given_tensor in (tensor, tensor.t(), tensor[:, None].expand(30, 1, 40)):
        found = Exponents()
        found.add(given_tensor)
        assert found.histogram() == want
    sliced = Exponents()
    sliced.add(tensor[::2, ::3])
    assert sliced.elements == 15 * 14
    empty = Exponents()
    empty.add(tensor[:0])
    assert empty == Exponents()


def test_a_tensor_of_several_chunks() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(2 * CHUNK + 17)
    found = Exponents()
    found.add(tensor)
    assert found.elements == sum(found.counts.values()) == tensor.numel()
    assert found.counts[0] == int(((tensor.abs() >= 1) & (tensor.abs() < 2)).sum())
    assert found.abs_max == float(tensor.abs().max())


def test_a_histogram_is_plain_data() -> None:
    text = json.dumps(asdict(seen(1.0, 0.25).histogram()))
    assert json.loads(text)["counts"] == {"-2": 1, "0": 1}


# --- the recommended scale -----------------------------------------------------------------------


def advice(*values: float, loss: float = 1.0) -> ScaleAdvice:
    return recommend_scale([seen(*values)], loss)


@pytest.mark.parametrize(
    ("largest", "power"),
    [
        (1.0, 14),  # 1 · 2 · 2**15 = 65536 is over 65504
        (0.99951171875, 14),  # 0.9995... · 2 · 2**15 = 65504 exactly is not under it
        (0.9995, 15),
        (2.0**-10, 24),
        (16376.0, 0),  # 16376 · 2 · 2 = 65504
        (16375.0, 1),
    ],
)
def test_a_recommended_scale_worked_out_by_hand(largest: float, power: int) -> None:
    found = advice(2.0**-30, -largest)
    assert found.scale == 2.0**power
    assert f"times 2**{power} and a head room of 2" in found.reason
    assert found.lost_without == 0.5
    assert found.lost_with == (0.5 if power < 6 else 0)


def test_weights_and_activations_count_together() -> None:
    found = recommend_scale([seen(2.0**-30, 2.0**-3), seen(2.0**-40, 0.0, 1.0)], 1.0)
    assert found.scale == 2.0**14
    assert (found.lost_without, found.lost_with) == (2 / 4, 1 / 4)


def test_no_scale_under_one() -> None:
    found = advice(40000.0)
    assert found.scale == 1
    assert "no head room even without a scale" in found.reason


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((0.0, 0.0), "every gradient is zero"),
        ((), "every gradient is zero"),
        ((1.0, math.inf), "the largest FP32 gradient is inf"),
        ((1.0, math.nan), "the largest FP32 gradient is nan"),
    ],
)
def test_sometimes_there_is_no_scale(values: tuple[float, ...], reason: str) -> None:
    found = advice(*values)
    assert (found.scale, found.lost_with) == (None, None)
    assert found.reason == reason


def test_the_scaled_loss_stays_in_fp32() -> None:
    assert advice(2.0**-140, loss=0.1).scale == 2.0**127
    found = advice(2.0**-100, loss=-(2.0**100))
    assert found.scale == 2.0**27
    assert "out of FP32's range" in found.reason
    assert "out of FP32's range" not in advice(1.0).reason


@pytest.mark.slow
@given(st.floats(2.0**-60, 60000.0, width=32))
def test_the_recommended_scale_is_the_largest_that_fits(largest: float) -> None:
    scale = advice(largest).scale
    assert scale is not None
    assert math.frexp(scale)[0] == 0.5
    assert scale == 1 or largest * scale * 2 < 65504
    assert largest * scale * 4 >= 65504


@pytest.mark.parametrize("scale", [0.5, 3.0, 0.0, -2.0, math.inf, math.nan, 1000.0])
def test_a_scale_is_a_power_of_two(scale: float) -> None:
    with pytest.raises(UsageError, match="is not a power of two of 1 or more"):
        log2(scale)


def test_log2_of_a_scale() -> None:
    assert [log2(2.0**k) for k in (0, 1, 16, 127)] == [0, 1, 16, 127]
