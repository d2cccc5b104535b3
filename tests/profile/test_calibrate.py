"""Calibration: which ranges it records, over which batches, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from amp_convert.capture.regions import capture
from amp_convert.profile.calibrate import Range, RangeStats, no_evidence, profile
from tests.staged import Staged

NAN, INF = math.nan, math.inf


class Doubler(nn.Module):
    """A float chain, an integer branch, two outputs of one node, a buffer, a constant."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -4.0, 0.0]))
        self.register_buffer("table", torch.tensor([1e-5, -1e-6, 0.0, 8.0]))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        scaled = x * self.scale
        best, where = scaled.max(-1)
        shifted = best + torch.tensor([3.0])
        return self.drop(scaled), shifted * self.table.sum(), where + 1


@pytest.fixture(scope="module")
def staged() -> Staged:
    return Staged.of(Doubler(), torch.tensor([[1.0, 2.0, 5.0], [-3.0, 0.5, 0.0]]))


def ranges_over(staged: Staged, *batches: torch.Tensor) -> RangeStats:
    return profile(staged.captured, [((batch,), {}) for batch in batches])


@pytest.mark.slow
def test_every_float_value_has_its_largest_magnitude(staged: Staged) -> None:
    """scaled is [[2, -8, 0], [-6, -2, 0]], its row maxima [2, 0], shifted [5, 3]."""
    found = {name: seen.abs_max for name, seen in staged.stats.ranges.items()}
    table = pytest.approx(8 - 1e-6 + 1e-5)
    assert staged.stats.batches == 1
    assert (found["scale"], found["table"]) == (4.0, 8.0)
    copied = ("/aten.clone#0", "/aten.lift_fresh_copy#0")
    nodes = {name: value for name, value in found.items() if "/" in name and name not in copied}
    assert nodes == {
        "/aten.mul#0": 8.0,
        "/aten.max#0": 2.0,
        "/operator.getitem#0": 2.0,
        "/aten.add#0": 5.0,
        "/aten.sum#0": table,
        "/aten.mul#1": pytest.approx(40, rel=1e-5),
    }
    # The constant of the model's code, whatever export calls it.
    assert [value for name, value in found.items() if "lifted" in name] == [3.0]


@pytest.mark.slow
def test_only_weights_have_a_share_of_tiny_values(staged: Staged) -> None:
    """Of the table's three nonzero values two are under 2**-14; zeros do not count."""
    shares = {n: r.tiny_share for n, r in staged.stats.ranges.items() if r.tiny_share is not None}
    assert shares["table"] == pytest.approx(2 / 3)
    assert shares["scale"] == 0.0
    assert all("#" not in name for name in shares)


def test_a_range_grows_over_batches_and_weights_count_once(staged: Staged) -> None:
    one, two = torch.full((2, 3), 0.5), torch.full((4, 3), 10.0)
    for batches in [(one, two), (two, one)]:
        stats = ranges_over(staged, *batches)
        assert stats.batches == 2
        assert stats.ranges["/aten.mul#0"].abs_max == 40.0
        assert replace(stats.ranges["scale"], under=()) == Range(4.0, 2.0, 0.0)


@pytest.mark.parametrize(("value", "seen"), [(NAN, NAN), (INF, INF), (-INF, INF)])
@pytest.mark.parametrize("last", [True, False])
def test_nan_and_infinity_are_never_dropped(
    staged: Staged, value: float, seen: float, last: bool
) -> None:
    bad = torch.tensor([[value, 1.0, 1.0], [1.0, 1.0, 1.0]])
    batches = [torch.ones(2, 3), bad] if last else [bad, torch.ones(2, 3)]
    found = ranges_over(staged, *batches).ranges["/aten.mul#0"]
    assert math.isnan(found.abs_max) if math.isnan(seen) else found.abs_max == seen


def test_integers_have_no_range(staged: Staged) -> None:
    assert "/operator.getitem#1" not in staged.stats.ranges
    assert "/aten.add#1" not in staged.stats.ranges


def test_an_empty_batch_measures_nothing_of_it(staged: Staged) -> None:
    stats = ranges_over(staged, torch.ones(2, 3), torch.ones(0, 3))
    assert stats.batches == 2
    assert stats.ranges["/aten.mul#0"].abs_max == 4.0


def test_no_batch_is_no_evidence(staged: Staged) -> None:
    assert profile(staged.captured, [], dtypes=[]) == no_evidence() == RangeStats(0, {})


def test_batches_are_read_once_and_one_at_a_time(staged: Staged) -> None:
    handed_out = 0

    def batches() -> Iterator[tuple[tuple[torch.Tensor], dict[str, Any]]]:
        nonlocal handed_out
        for _ in range(3):
            handed_out += 1
            yield (torch.ones(2, 3),), {}

    assert profile(staged.captured, batches()).batches == handed_out == 3


def test_keywords_reach_the_model(staged: Staged) -> None:
    stats = profile(staged.captured, [((), {"x": torch.full((2, 3), 7.0)})])
    assert stats.ranges["/aten.mul#0"].abs_max == 28.0


@pytest.mark.slow
def test_calibration_leaves_no_trace() -> None:
    """Neither in the random state, nor in training flags, gradients or running statistics."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    captured = capture(model, (torch.randn(4, 3),), {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    stats = profile(captured, [((torch.randn(4, 3, generator=torch.Generator()),), {})])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    # In eval mode dropout is the identity: what is left is the normalisation.
    assert [n for n in stats.ranges if "/" in n] == [
        "0/aten._native_batch_norm_legit_no_training#0",
        "0/operator.getitem#0",
    ]


def test_a_model_without_values_has_no_evidence() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(3, 3), torch.empty(2, 3)
    captured = capture(model, (x,), {})
    assert profile(captured, [((x,), {})]) == no_evidence()


# --- one range -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "abs_max", "maximum"),
    [
        ([1.0, -3.0], 3.0, 1.0),
        ([-2.0, -3.0], 3.0, -2.0),
        ([-0.0], 0.0, 0.0),
        ([INF, 1.0], INF, INF),
        ([-INF, 1.0], INF, 1.0),
        ([NAN, INF], NAN, NAN),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_range_has_the_largest_magnitude_and_the_largest_value(
    values: list[float], abs_max: float, maximum: float, dtype: torch.dtype
) -> None:
    found = Range.of(torch.tensor(values, dtype=dtype, requires_grad=True))
    assert same(found, Range(abs_max, maximum))
    assert math.copysign(1.0, found.abs_max) == 1.0


@pytest.mark.parametrize(
    ("values", "integral"),
    [
        ([0.0, 1.0, -7.0], True),
        ([0.0], True),
        ([2.0**24], True),
        ([2.0**24 + 2], False),  # FP32 has not counted there
        ([-1e9, 0.0], False),
        ([1.0, 1.5], False),
        ([1.0, INF], False),
        ([1.0, NAN], False),
    ],
)
def test_what_may_count_and_holds_integers_alone_counts(
    values: list[float], integral: bool
) -> None:
    tensor = torch.tensor(values)
    assert Range.of(tensor, may_count=True).integral == integral
    assert not Range.of(tensor).integral


def same(one: Range, two: Range) -> bool:
    """Whether two ranges are equal but for their rows, NaN equal to NaN."""
    one, two = (replace(each, lowest_row=INF) for each in (one, two))
    pairs = zip(astuple(one), astuple(two), strict=True)
    return all(a == b or (a != a and b != b) for a, b in pairs)


def test_the_lowest_row_is_measured_where_there_may_be_a_mask() -> None:
    rows = torch.tensor([[0.5, -1e9], [-2e9, -1e9]])
    assert Range.of(rows).lowest_row == -1e9
    assert Range.of(rows).masks_whole_rows
    assert Range.of(rows[:1]).lowest_row == 0.5
    assert not Range.of(rows[:1]).masks_whole_rows
    assert Range.of(rows[:1]).merged(Range.of(rows[1:])) == Range.of(rows)
    assert Range.of(torch.tensor([[-1e3], [3.0]])).lowest_row == INF


NUMBERS = st.lists(st.floats(width=32) | st.integers(-9, 9).map(float), min_size=1)


@given(NUMBERS, NUMBERS, st.booleans())
def test_merging_is_measuring_together(one: list[float], two: list[float], count: bool) -> None:
    def measured(values: list[float]) -> Range:
        return Range.of(torch.tensor(values), may_count=count)

    both = measured(one + two)
    assert same(measured(one).merged(measured(two)), both)
    assert same(measured(two).merged(measured(one)), both)


def test_merging_keeps_the_share_of_tiny_values() -> None:
    assert Range(1.0, -1.0, 0.25).merged(Range(2.0, 0.5)) == Range(2.0, 0.5, 0.25)
    assert Range(NAN, NAN, 0.25).merged(Range(2.0, 2.0)).tiny_share == 0.25


@given(st.lists(st.integers(-60, 20), min_size=1), st.floats(1.0, 1.999), st.integers(-24, 24))
def test_the_share_of_tiny_weights_is_known_after_scaling(
    powers: list[int], mantissa: float, shift: int
) -> None:
    weights = torch.tensor([mantissa * 2.0**power for power in powers] + [0.0])
    scaled = Range.of(weights, is_weight=True).scaled(2.0**shift)
    measured = Range.of(weights * 2.0**shift, is_weight=True)
    assert scaled.tiny_share == measured.tiny_share
    assert (scaled.abs_max, scaled.maximum) == (measured.abs_max, measured.maximum)
