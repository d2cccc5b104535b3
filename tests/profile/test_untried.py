"""What rounding trials leave alone, how they are merged, and what they say of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from amp_convert.profile.growth import Growth
from amp_convert.profile.rounding_trials import NOTABLE
from amp_convert.rules.rule_set import GuardLimits
from tests.profile.trier import Trier, blamed, normal, tried

F16, BF16 = torch.float16, torch.bfloat16


aten = torch.ops.aten


# --- what is left alone --------------------------------------------------------------------------


def test_random_numbers_are_drawn_once() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return aten.bernoulli(torch.sigmoid(x + 1000.0) / 2) - 1000.0 + torch.rand(4)

    torch.manual_seed(3)
    graph = make_fx(compute)(normal(4))
    torch.manual_seed(5)
    want = graph(normal(4))
    torch.manual_seed(5)
    trier = Trier(graph, F16)
    assert torch.equal(trier.run(normal(4)), want)
    assert "bernoulli" not in trier.found
    assert set(blamed(trier.found)) <= {"sub"}


def test_a_lookup_beside_the_way_is_not_run_again() -> None:
    """A rounded position of 999.5 would be 1000, and outside the table."""
    table = normal(1000, 4)

    def compute(x: torch.Tensor) -> torch.Tensor:
        position = x * 1000.0
        lower = position.floor()
        return table[lower.long()] * (position - lower)[:, None]

    found = tried(compute, torch.tensor([0.9997, 0.3, 0.7, 0.5]))
    assert found["sub"].inputs > 20


def test_a_lookup_on_the_way_that_fails_is_infinite_growth() -> None:
    table = normal(1000)

    def compute(x: torch.Tensor) -> torch.Tensor:
        position = x * 1000.0
        return (position + table[position.long()]) - 1000.0

    assert math.isinf(tried(compute, torch.tensor([0.9999]))["mul"].result)


def test_memory_that_is_not_written_yet_is_not_tried() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x + 1.0)
        return torch.slice_scatter(out, x, 0)

    found = tried(compute, normal(4, 4))
    assert "empty_like" not in found
    assert blamed(found) == {}


@pytest.mark.parametrize("train", [False, True])
def test_dropout_is_tried_where_it_does_nothing(train: bool) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return aten.native_dropout(x + 1000.0, 0.5, train)[0] - 1000.0

    found = tried(compute, normal(64))
    assert ("native_dropout" in found) is (not train)


@pytest.fixture(scope="module")
def counting() -> Iterator[list[int]]:
    """A custom operator that notes each of its calls."""
    calls: list[int] = []
    with torch.library._scoped_library("amp_convert_rounding", "DEF") as library:
        library.define("noted(Tensor x) -> Tensor")
        library.impl("noted", lambda x: calls.append(1) or x * 2, "CompositeExplicitAutograd")
        yield calls


def test_a_custom_operator_runs_once(counting: list[int]) -> None:
    noted = torch.ops.amp_convert_rounding.noted
    graph = make_fx(lambda x: (noted(x - 900.0) - 200.0) + 1)(normal(8, mean=1000.0))
    counting.clear()
    trier = Trier(graph, F16)
    trier.run(normal(8, mean=1000.0))
    assert len(counting) == 1
    assert trier.found["noted"].inputs == 0.0


NUMBERS = st.floats(min_value=0) | st.just(math.nan)


GROWTHS = st.builds(Growth, NUMBERS, NUMBERS, st.sampled_from(["a", "b"]))


# --- merging -------------------------------------------------------------------------------------


@given(GROWTHS, GROWTHS)
def test_merging_keeps_the_worst(one: Growth, other: Growth) -> None:
    both = one.merged(other)
    for name in ("inputs", "result"):
        values = [getattr(one, name), getattr(other, name)]
        if any(map(math.isnan, values)):
            assert math.isnan(getattr(both, name))
        else:
            assert getattr(both, name) == max(values)
    assert both.reader in (one.reader, other.reader)


def test_the_reader_is_that_of_the_larger_growth() -> None:
    assert Growth(1.0, 20.0, "a").merged(Growth(3.0, 30.0, "b")) == Growth(3.0, 30.0, "b")
    assert Growth(1.0, 30.0, "a").merged(Growth(3.0, 20.0, "b")) == Growth(3.0, 30.0, "a")
    assert GuardLimits().rounding_growth > NOTABLE


# --- outputs, increments -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_last_operations_before_an_output_of_little_spread(dtype: torch.dtype) -> None:
    def years(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) @ w + 2005

    found = tried(years, normal(64, 16), normal(16, 4) / 4, dtype=dtype)
    # Rounded, 2005 keeps whole years in FP16 and every eighth one in BF16.
    assert found["add"].output > 100
    assert found["mm"].output < 24  # the default limit
    assert found.get("relu", Growth()).output == 0


def test_a_product_is_the_last_operation_with_all_that_it_reads() -> None:
    def offset_taken_off(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x) + 2000) @ (w - w.mean(0)) + 2005

    found = tried(offset_taken_off, normal(64, 16), normal(16, 4))
    assert found["mm"].output > 100
    assert {n for n, growth in found.items() if growth.output} == {"mm", "add_1"}


def test_each_output_has_its_own_error() -> None:
    found = tried(lambda x: (x + 3000, x * 2), normal(64, 4))
    assert found["add"].output > 100
    assert found["mul"].output < NOTABLE


@pytest.mark.parametrize(
    ("compute", "lost"),
    [
        (lambda x: x + 1e-5 * torch.ones_like(x), True),
        (lambda x: x - 1e-5 * torch.ones_like(x), True),
        (lambda x: x + 1e-1 * torch.ones_like(x), False),
        (lambda x: torch.sin(x) + 3 + 1e-5 * torch.ones_like(x), True),
        (lambda x: (torch.exp(x) + 1e-5 * torch.ones_like(x)).t() + 1, False),
        (lambda x: (torch.exp(x) + 1e-5 * torch.ones_like(x)) + x, True),
        (lambda x: torch.exp(x) + 1e-5 * torch.ones_like(x), False),
    ],
    ids=["input", "taken off", "large", "sum", "number", "added to again", "one sum"],
)
def test_an_increment_below_a_unit_in_the_last_place_is_lost(
    compute: Callable[..., Any], lost: bool
) -> None:
    found = tried(compute, torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1)
    assert (max(growth.lost for growth in found.values()) > 0.9) == lost
