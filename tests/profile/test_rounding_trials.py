"""Trials of rounding errors: what grows, who is blamed, what is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from amp_convert.core.number_formats import unit_roundoff
from amp_convert.profile.growth import Growth
from amp_convert.profile.rounding_trials import NOTABLE, WINDOW, Trials, keep_window
from amp_convert.rules.rule_set import GuardLimits

F16, BF16 = torch.float16, torch.bfloat16
aten = torch.ops.aten


class Trier(fx.Interpreter):
    """Runs a graph as calibration does, and keeps what the trials say of each node."""

    def __init__(self, graph_module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(graph_module)
        self.user_to_last_uses = keep_window(graph_module.graph, self.user_to_last_uses)
        self.trials = Trials(graph_module.graph, {"sub": "the difference"}, {}, dtype)
        self.found: dict[str, Growth] = {}
        self.kept = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.kept = max(self.kept, len(self.env))
        for node, growth in self.trials.of(n, self.env, result):
            self.found[node.name] = growth.merged(self.found.get(node.name, growth))
        return result


def tried(
    compute: Callable[..., Any], *inputs: torch.Tensor, dtype: torch.dtype = F16
) -> dict[str, Growth]:
    trier = Trier(make_fx(compute)(*inputs), dtype)
    trier.run(*inputs)
    return trier.found


def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean


def blamed(found: dict[str, Growth]) -> dict[str, str]:
    return {name: growth.reader for name, growth in found.items() if not growth.result <= 20}


# --- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.relu(x) + 1,
        lambda x, w: torch.layer_norm(x, (64,)),
        lambda x, w: torch.softmax(x @ w / 8, -1),
        lambda x, w: (x * x).mean(-1),
    ],
    ids=["product", "elementwise", "norm", "attention", "moment"],
)
def test_ordinary_operators_do_not_let_errors_grow(
    compute: Callable[..., Any], dtype: torch.dtype
) -> None:
    found = tried(compute, normal(32, 64), normal(64, 64), dtype=dtype)
    assert found
    assert all(0 < growth.inputs < 2 for growth in found.values())
    assert blamed(found) == {}


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_growth_is_the_error_of_the_result_in_roundoffs(dtype: torch.dtype) -> None:
    """By hand: both inputs rounded, subtracted in FP64, against the exact difference."""
    x = normal(1000, mean=100.0)
    y = x.flip(0) + 0.5
    want = x.double() - y.double()
    have = x.to(dtype).double() - y.to(dtype).double()
    expected = float((have - want).norm() / want.norm()) / unit_roundoff(dtype)
    found = tried(lambda x, y: x - y, x, y, dtype=dtype)
    assert found["sub"].inputs == pytest.approx(expected, rel=1e-4)
    assert expected > 10


def test_terms_that_vanish_show_in_float16_alone() -> None:
    x = torch.full((1, 4096), 1e-8)
    compute = lambda x: x @ torch.ones(4096, 1)  # noqa: E731
    assert tried(compute, x)["mm"].inputs == pytest.approx(2048)
    assert tried(compute, x, dtype=BF16)["mm"].inputs < 1


def test_a_refusal_is_infinite_growth() -> None:
    """Rounded, the matrix is no longer positive definite."""
    graph = fx.Graph()
    doubled = graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2.0))
    graph.output(graph.call_function(aten.linalg_cholesky.default, (doubled,)))
    trier = Trier(fx.GraphModule({}, graph), BF16)
    trier.run(torch.tensor([[1.0, 1.004], [1.004, 1.0115]]))
    assert math.isinf(trier.found["linalg_cholesky_default"].inputs)
    assert math.isinf(trier.found["mul_tensor"].result)


def test_what_leaves_the_range_is_not_rounded() -> None:
    """The range guards answer for it: a mask of -1e9 has no growth."""
    mask = torch.tensor([0.0, -1e9, 0.0, torch.finfo(torch.float32).min])
    found = tried(lambda s, m: torch.softmax(s + m, -1), normal(8, 4), mask)
    assert all(growth.inputs < 2 for growth in found.values())
    nan = tried(lambda x: x + 1, torch.tensor([1.0, math.nan, math.inf]))
    assert nan["add"].inputs < 1


def test_a_normalisation_reads_its_statistics_in_fp32() -> None:
    """Rounded, a running mean of 1000.3 would be off by a quarter."""
    mean, var = torch.full((4,), 1000.3), torch.ones(4)

    def compute(x: torch.Tensor) -> Any:
        return aten._native_batch_norm_legit_no_training(x, None, None, mean, var, 0.1, 1e-5)[0]

    exact = torch.full((8, 4), 1000.0) + torch.arange(8.0)[:, None] / 2
    (growth,) = tried(compute, exact).values()
    assert growth.inputs == 0


# --- blame ---------------------------------------------------------------------------------------


def test_the_square_and_the_mean_are_blamed_but_not_what_both_are_made_of() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        h = x + 30.0
        mean = h.mean(-1)
        return (h * h).mean(-1) - mean * mean

    found = tried(compute, normal(8, 1024))
    reader = "the difference"
    assert blamed(found) == {"mean": reader, "mean_1": reader, "mul_1": reader}
    assert found["sub"].inputs > 50 > 20 > found["add"].result


def test_blame_stops_where_the_offset_is_made() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        small = x * 2
        large = small + 1000.0
        return (large * 1.5).view(-1) - 1500.0

    found = tried(compute, normal(8, 64))
    assert set(blamed(found)) == {"add", "mul_1", "view"}


def test_an_input_is_never_blamed_for_nobody_could_keep_it() -> None:
    found = tried(lambda x: x - 1000.0, normal(64, mean=1000.0))
    assert blamed(found) == {}
    assert found["sub"].inputs > 100


def test_one_output_of_several_is_blamed_as_it_is() -> None:
    found = tried(lambda x: (x + 1000.0).split(32, -1)[0] - 1000.0, normal(4, 64))
    assert set(blamed(found)) == {"add", "split", "getitem"}


@pytest.mark.parametrize("steps", [1, WINDOW - 2, WINDOW + 8])
def test_blame_reaches_back_as_far_as_the_window(steps: int) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        x = x + 1000.0
        for _ in range(steps):
            x = torch.relu(x)
        return x - 1000.0

    found = tried(compute, normal(64))
    assert len(blamed(found)) == min(steps + 1, WINDOW)


def test_only_a_window_of_values_is_kept() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4 * WINDOW):
            x = torch.relu(x)
        return x

    trier = Trier(make_fx(compute)(normal(4)), F16)
    trier.run(normal(4))
    assert trier.kept == WINDOW + 1


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


# --- merging -------------------------------------------------------------------------------------

NUMBERS = st.floats(min_value=0) | st.just(math.nan)
GROWTHS = st.builds(Growth, NUMBERS, NUMBERS, st.sampled_from(["a", "b"]))


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
