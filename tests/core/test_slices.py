"""The worst slice of an output: what a sum over everything hides. Held against NumPy-like sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amp_convert.core.slices import ClassSums, SliceError, SliceKind, SliceSums, frontier
from amp_convert.core.slices import classes as class_sums
from amp_convert.core.slices import sums as sums_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(kind: SliceKind, *batches: tuple[torch.Tensor, ...]) -> list[SliceError]:
    """The frontier of one kind over some batches."""
    sums = SliceSums()
    for batch in batches:
        sums.add(*batch)
    return [found for found in sums.slices() if found.kind is kind]


def spread_error(want: torch.Tensor, have: torch.Tensor) -> float:
    want, have = want.double().flatten(), have.double().flatten()
    return float((have - want).norm() / (want - want.mean()).norm())


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_channel_is_measured_by_what_it_varies(dim: int) -> None:
    want = normal(6, 3, 4, 5) + 100
    have = want.clone()
    have.select(dim, 2).add_(0.5)
    worst = next(f for f in of(SliceKind.CHANNEL, (want, have)) if f.dim == dim)
    assert (worst.index, worst.elements) == (2, want.numel() // want.shape[dim])
    expected = spread_error(want.select(dim, 2), have.select(dim, 2))
    assert worst.error == pytest.approx(expected, rel=1e-6)
    assert worst.error > 0.4  # relative to the values it is 0.005


def test_a_channel_takes_in_all_batches_and_a_sample_one() -> None:
    batches = [(normal(4, 10, seed=i), normal(4, 10, seed=i) * 1.01) for i in range(3)]
    batches[2][1][1] += 3
    (whole,) = of(SliceKind.WHOLE, *batches)
    assert whole.elements == 120
    sample = of(SliceKind.SAMPLE, *batches)[0]
    assert (sample.batch, sample.index, sample.elements) == (2, 1, 10)
    assert sample.error == pytest.approx(spread_error(batches[2][0][1], batches[2][1][1]))
    channels = of(SliceKind.CHANNEL, *batches)
    assert {found.elements for found in channels} == {12}


def test_an_offset_of_all_is_an_error_of_the_whole() -> None:
    """Years: 2008 for each, where they lie between 2003 and 2007."""
    want = 2005 + normal(64, 1)
    (whole,) = of(SliceKind.WHOLE, (want, torch.full_like(want, 2008.0)))
    assert whole.error > 2.5


def test_a_faint_channel_is_told_apart() -> None:
    want = normal(32, 4)
    want[:, 3] *= 1e-8
    have = want.clone()
    have[:, 3] = 0
    (faint,) = of(SliceKind.FAINT_CHANNEL, (want, have))
    assert (faint.index, round(faint.error)) == (3, 1)
    assert all(found.error == 0 for found in of(SliceKind.CHANNEL, (want, have)))


@pytest.mark.parametrize("size", [7, 8])
def test_fewer_than_eight_elements_have_no_spread(size: int) -> None:
    want = normal(1, size)
    assert bool(of(SliceKind.SAMPLE, (want, want))) == (size == 8)
    assert of(SliceKind.CHANNEL, (want, want)) == []


def test_a_dimension_that_varies_has_no_channels() -> None:
    batches = [(normal(8, size, 9), normal(8, size, 9)) for size in (5, 6)]
    assert {found.dim for found in of(SliceKind.CHANNEL, *batches)} == {2}


def test_a_slice_that_says_nothing_is_infinitely_wrong_or_right() -> None:
    same = torch.full((8, 2), 3.0)
    off = same.clone()
    off[0, 1] = 4
    assert [f.error for f in of(SliceKind.WHOLE, (same, same))] == [0.0]
    assert of(SliceKind.CHANNEL, (same, off))[0].error == math.inf


def test_nan_is_the_worst_there_is_and_equal_infinities_are_none() -> None:
    want, have = normal(8, 4), normal(8, 4)
    want[:, 0] = have[:, 0] = -math.inf
    assert math.isfinite(of(SliceKind.WHOLE, (want, have))[0].error)
    have[2, 1] = math.nan
    for kind in (SliceKind.WHOLE, SliceKind.CHANNEL):
        assert math.isnan(of(kind, (want, have))[0].error)


def test_noise_keeps_what_is_worse_than_all_of_less_noise() -> None:
    def one(error: float, noise: float) -> SliceError:
        return SliceError(SliceKind.SAMPLE, 0, error, noise, 9)

    rows = [one(9.0, 5.0), one(8.0, 6.0), one(3.0, 1.0), one(2.0, 2.0), one(1.0, 0.0)]
    assert frontier([one(5.0, 2e-7), one(4.0, 1e-7)]) == [one(5.0, 2e-7)]
    assert frontier(rows[::-1]) == [rows[0], rows[2], rows[4]]
    nan = one(math.nan, 0.5)
    assert frontier([*rows, nan]) == [nan, rows[4]]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_for_any_tolerance_the_frontier_has_the_worst_that_noise_does_not_excuse(
    pairs: list[tuple[int, int]],
) -> None:
    rows = [
        SliceError(SliceKind.SAMPLE, i, float(e), float(n), 9) for i, (e, n) in enumerate(pairs)
    ]
    kept = frontier(rows)
    for tolerance in range(10):
        every = [row.error for row in rows if row.noise <= tolerance]
        assert max(every, default=-1) == max(
            (row.error for row in kept if row.noise <= tolerance), default=-1
        )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 50))
def test_blocks_change_nothing(shape: list[int], chunk: int) -> None:
    want, have, noise = (normal(*shape, seed=s) for s in range(3))
    whole, parts = SliceSums(), SliceSums()
    whole.add(want, have, noise)
    before, sums_of.CHUNK = sums_of.CHUNK, chunk
    try:
        parts.add(want, have, noise)
    finally:
        sums_of.CHUNK = before
    for one, other in zip(whole.slices(), parts.slices(), strict=True):
        assert (one.kind, one.index, one.dim) == (other.kind, other.index, other.dim)
        assert one.error == pytest.approx(other.error, rel=1e-9)


def test_memory_does_not_grow_with_the_batches() -> None:
    sums = SliceSums()
    for seed in range(50):
        want = normal(64, 8, seed=seed)
        sums.add(want, want + 1e-3 * normal(64, 8, seed=seed + 1), want + 1e-7)
    assert len(sums._samples) < 5


# --- classes -------------------------------------------------------------------------------------


def test_a_class_is_the_share_of_its_elements_that_changed() -> None:
    want = torch.tensor([0] * 90 + [7] * 10)
    have = want.clone()
    have[-9:] = 0
    sums = ClassSums(SliceKind.CLASS)
    sums.add(want, have, want)
    (row,) = sums.slices()
    assert (row.index, row.error, row.noise, row.elements) == (7, 0.9, 0.0, 10)


def test_numbers_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_sums, "MOST_CHANNELS", 10)
    for most, found in ((10, 10), (11, 0)):
        numbers = torch.arange(most).repeat(9)
        sums = ClassSums(SliceKind.CLASS)
        sums.add(numbers, numbers + 1)
        assert len(sums.slices()) == found


def test_a_large_vocabulary_has_channels() -> None:
    reference = normal(8, 130_000)
    value = reference.clone()
    value[:, 129_999] = 0
    (worst,) = of(SliceKind.CHANNEL, (reference, value))
    assert worst.index == 129_999


@pytest.mark.parametrize(
    ("shape", "axis"), [((90, 5), 1), ((4, 30, 5), 2), ((4, 5, 6, 6), 1), ((40,), None)]
)
def test_logits_lose_a_class(shape: tuple[int, ...], axis: int | None) -> None:
    want = normal(*shape)
    have = want.clone()
    if axis is not None:
        have.select(axis, 3).sub_(100)
    found = of(SliceKind.LARGEST, (want, have))
    assert [(row.index, row.error) for row in found] == ([] if axis is None else [(3, 1.0)])


def test_classes_that_come_again_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_sums, "MOST_CHANNELS", 10)
    classes = torch.arange(8)
    sums = ClassSums(SliceKind.CLASS)
    sums.add(classes, classes)
    sums.add(classes.repeat(9), torch.where(classes == 5, 0, classes).repeat(9))
    (found,) = sums.slices()
    assert (found.index, found.elements, found.error) == (5, 10, 0.9)
