"""Trials of rounding errors: what grows, who is blamed, what is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from amp_convert.core.number_formats import unit_roundoff
from amp_convert.profile.rounding_trials import WINDOW
from tests.profile.trier import Trier, blamed, normal, tried

F16, BF16 = torch.float16, torch.bfloat16


aten = torch.ops.aten


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
