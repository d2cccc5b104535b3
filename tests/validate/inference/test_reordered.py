"""Rows that only changed places among near-equal scores are put back; nothing else is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amp_convert.validate.inference.reordered import RowMatcher

MATCHER = RowMatcher(torch.float16, 2)


def detections(rows: int = 6) -> dict[str, torch.Tensor]:
    """Two samples of boxes, falling scores and labels; the scores of rows 2 and 3 are as good as
    equal."""
    scores = torch.linspace(0.9, 0.4, rows).repeat(2, 1)
    scores[:, 3] = scores[:, 2] - 1e-4
    boxes = torch.rand(2, rows, 4, generator=torch.Generator().manual_seed(0)) * 100
    return {"boxes": boxes, "scores": scores, "labels": torch.arange(2 * rows).reshape(2, rows)}


def swapped(given: dict[str, torch.Tensor], one: int, other: int) -> dict[str, torch.Tensor]:
    """Two rows of the second sample in each other's places."""
    order = list(range(given["scores"].shape[1]))
    order[one], order[other] = order[other], order[one]
    return {n: torch.stack([t[0], t[1][order]]) for n, t in given.items()}


def test_near_equal_scores_may_swap_their_rows() -> None:
    want = detections()
    found, counts = MATCHER.matched(want, swapped(want, 2, 3))
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert counts == dict.fromkeys(want, (12, 2))


def test_rows_in_their_places_are_counted() -> None:
    want = detections()
    found, counts = MATCHER.matched(want, want)
    assert counts == dict.fromkeys(want, (12, 0))
    assert all(found[name] is want[name] for name in want)


def test_scores_that_differ_may_not() -> None:
    want = detections()
    have = swapped(want, 1, 4)
    found, counts = MATCHER.matched(want, have)
    assert all(torch.equal(found[name], have[name]) for name in want)
    assert {moved for _, moved in counts.values()} == {0}


@pytest.mark.parametrize("name", ["boxes", "labels"])
def test_a_row_that_is_another_is_no_row_that_moved(name: str) -> None:
    want = detections()
    have = swapped(want, 2, 3)
    have[name] = have[name].clone()
    have[name][1, 2] += 7
    found, _ = MATCHER.matched(want, have)
    assert torch.equal(found[name], have[name])


def test_a_row_may_not_stand_in_two_places() -> None:
    want = detections()
    have = {name: tensor.clone() for name, tensor in want.items()}
    for tensor in have.values():
        tensor[1, 3] = tensor[1, 2]
    found, _ = MATCHER.matched(want, have)
    assert torch.equal(found["labels"], have["labels"])


def test_without_a_score_nothing_moves() -> None:
    want = {"boxes": detections()["boxes"]}
    found, counts = MATCHER.matched(want, swapped(detections(), 2, 3) | {"scores": 0, "labels": 0})
    assert counts == {}
    assert not torch.equal(found["boxes"], want["boxes"])


def test_the_samples_of_a_batch_are_never_reordered() -> None:
    """Two of them are always in some order."""
    want = {"output": torch.tensor([[1.0, 5.0], [1.0001, 7.0]])}
    have = {"output": want["output"].flip(0)}
    found, counts = MATCHER.matched(want, have)
    assert torch.equal(found["output"], have["output"])
    assert counts.get("output", (0, 0))[1] == 0


def test_rows_without_a_batch_are_those_of_one_image() -> None:
    want = {name: tensor[1] for name, tensor in detections().items()}
    have = {name: tensor[1] for name, tensor in swapped(detections(), 2, 3).items()}
    found, counts = MATCHER.matched(want, have)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert counts["labels"] == (6, 2)


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(6)), st.permutations(range(6)))
def test_putting_back_makes_no_rows(one: list[int], other: list[int]) -> None:
    """Whatever the order, the rows are the same, and no error grows."""
    want = detections()
    have = {n: torch.stack([t[0][one], t[1][other]]) for n, t in want.items()}
    found, _ = MATCHER.matched(want, have)
    for sample in range(2):
        assert sorted(found["labels"][sample].tolist()) == sorted(want["labels"][sample].tolist())
    for name in want:
        before, after = ((x[name].double() - want[name]).norm() for x in (have, found))
        assert after <= before
