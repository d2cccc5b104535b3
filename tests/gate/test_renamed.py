"""Renamed nodes are matched by their operators, in linear time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from amp_convert.gate.renamed import _matched
from tests.growth import assert_linear

LAYER = ["aten.linear", "aten.gelu", "aten.linear", "aten.add", "aten.layer_norm"]


def test_equal_graphs_match_node_by_node() -> None:
    assert list(_matched(LAYER * 2_000, LAYER * 2_000)) == [(i, i) for i in range(10_000)]


@pytest.mark.slow
def test_what_repeats_itself_takes_linear_time() -> None:
    """Each layer has lost a node and got another: no run of equal operators is long."""
    other = ["aten.linear", "aten.silu", "aten.linear", "aten.mul", "aten.add", "aten.layer_norm"]
    assert_linear(lambda count: list(_matched(LAYER * count, other * count)), 200)
    found = list(_matched(LAYER * 2_000, other * 2_000))
    assert all((LAYER * 2_000)[i] == (other * 2_000)[j] for i, j in found)
    assert all(one[0] < next_[0] and one[1] < next_[1] for one, next_ in pairwise(found))
    assert len(found) > 6_000


def test_nothing_in_common_ends() -> None:
    assert list(_matched(["a"] * 1_000, ["b"] * 700)) == []
    assert list(_matched([], ["b"])) == []
