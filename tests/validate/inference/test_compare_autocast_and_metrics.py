"""Autocast beside, metrics, and what is left as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.memory_meter import peak_bytes
from amp_convert.validate.inference.compare import compare
from tests.bits import assert_same_bits
from tests.validate.inference.small_nets import on, rel_l2, two_layers
from tests.zoo import both_dtypes

X = torch.linspace(-2, 2, 40).reshape(5, 8)


# --- native autocast -----------------------------------------------------------------------------


@both_dtypes
def test_autocast_runs_beside(dtype: torch.dtype) -> None:
    model = two_layers()
    divergence = on(amp.convert(model, X, dtype=dtype), X, 2 * X)
    with torch.no_grad():
        want = [model(X), model(2 * X)]
        with torch.autocast("cpu", dtype=dtype):
            have = [model(X), model(2 * X)]
    [row] = divergence.autocast_outputs
    assert row.rel_l2 == pytest.approx(rel_l2(want, have), rel=1e-12)
    assert row.name == divergence.outputs[0].name == "output"
    assert divergence.autocast_reason == ""


class Banned(nn.Module):
    """Fails under autocast from the n-th batch on, which it counts where no call puts it back."""

    good = 0

    def __init__(self, good: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)
        type(self).good = good

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            type(self).good -= 1
            if self.good < 0:
                raise RuntimeError("not under autocast, please\nand a second line")
        return self.linear(x)


@pytest.mark.parametrize("good", [0, 1])
def test_a_model_that_autocast_breaks_is_a_result(good: int) -> None:
    """Numbers from a part of the batches would not be comparable with the others."""
    mixed = amp.convert(Banned(good).eval(), X)
    divergence = on(mixed, X, X, X, score=lambda outputs, _: {"mean": float(outputs.mean())})
    assert divergence.autocast_outputs == ()
    assert "fails under torch.autocast: not under autocast, please" in divergence.autocast_reason
    assert "\n" not in divergence.autocast_reason
    [metric] = divergence.metrics
    assert metric.autocast is None
    assert math.isfinite(metric.mixed)
    assert len(divergence.outputs) == 1


def test_autocast_can_be_left_out() -> None:
    divergence = on(amp.convert(Banned(0).eval(), X), X, autocast=False)
    assert divergence.autocast_outputs == ()
    assert divergence.autocast_reason == "it was not asked for"


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_are_means_weighted_by_batch_size() -> None:
    model = two_layers()
    mixed = amp.convert(model, X)
    batches = [((X,), {}, 1.0), ((X[:1] * 2,), {}, 10.0)]
    seen: list[tuple[torch.dtype, float]] = []

    def score(outputs: torch.Tensor, target: float) -> dict[str, float]:
        seen.append((outputs.dtype, target))
        return {"sum": float(outputs.sum()) + target, "error": -target}

    divergence = compare(mixed, batches, score=score, lower_is_better=frozenset({"error"}))
    assert [metric.doubt for metric in divergence.metrics] == [None, None]
    with torch.no_grad():
        arms = {"fp32": model, "mixed": mixed}
        expected = {
            arm: (5 * (float(m(X).sum()) + 1) + float(m(X[:1] * 2).sum()) + 10) / 6
            for arm, m in arms.items()
        }
        with torch.autocast("cpu", dtype=torch.float16):
            sums = [model(X).float().sum(), model(X[:1] * 2).float().sum()]
    total, error = divergence.metrics
    assert (total.name, total.lower_is_better) == ("sum", False)
    assert total.fp32 == pytest.approx(expected["fp32"], rel=1e-12)
    assert total.mixed == pytest.approx(expected["mixed"], rel=1e-12)
    assert total.autocast == pytest.approx((5 * (float(sums[0]) + 1) + float(sums[1]) + 10) / 6)
    assert (error.name, error.lower_is_better) == ("error", True)
    assert error.fp32 == error.mixed == error.autocast == pytest.approx(-(5 * 1 + 10) / 6)
    assert divergence.metrics_reason == ""
    assert {dtype for dtype, _ in seen} == {torch.float32}, "metrics see the original's dtypes"
    assert [target for _, target in seen] == [1.0] * 7 + [10.0] * 7, "with the four of the probe"


def test_no_metrics_have_a_reason() -> None:
    divergence = on(amp.convert(two_layers(), X), X, metrics_reason="eval_batches is missing")
    assert divergence.metrics == ()
    assert divergence.metrics_reason == "eval_batches is missing"


# --- what is left as it was ----------------------------------------------------------------------


@pytest.mark.slow
def test_flags_and_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(two_layers(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    mixed = amp.convert(model.train(), X)
    model[2].eval()
    flags = [m.training for m in (*model.modules(), *mixed.modules())]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    first, second = on(mixed, X), on(mixed, X)
    assert [m.training for m in (*model.modules(), *mixed.modules())] == flags
    assert torch.equal(torch.get_rng_state(), seed)
    assert_same_bits(state, dict(model.state_dict()))
    assert first == second
    assert all(p.grad is None for p in model.parameters())


class Counting(nn.Module):
    """Keeps a count in eval mode, and lets it show."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


@pytest.mark.slow
def test_buffers_are_left_as_they_were() -> None:
    """And each arm starts from the same ones, or it would be compared with another model."""
    model = Counting().eval()
    mixed = amp.convert(model, X)
    assert float(model.calls) == 0
    divergence = on(mixed, X)
    assert float(model.calls) == 0
    assert divergence.outputs[0].rel_l2 < 1e-3
    assert divergence.autocast_outputs[0].rel_l2 < 1e-3


@pytest.mark.slow
def test_batches_are_left_as_they_were() -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x * 1)
            x.add_(1)
            return y

    x = X.clone()
    mixed = amp.convert(Shifting().eval(), X.clone())
    divergence = on(mixed, x)
    assert torch.equal(x, X)
    assert divergence.frozen_identical
    assert divergence.outputs[0].rel_l2 < 1e-3
    assert divergence.autocast_outputs[0].rel_l2 < 1e-3


def test_batches_are_taken_one_at_a_time() -> None:
    """A data set need not fit into memory; progress is told after each batch."""
    mixed, told = amp.convert(two_layers(), X), []

    def batches() -> Iterator[Any]:
        for index in range(3):
            assert len(told) == index
            yield (X,), {}, None

    divergence = compare(mixed, batches(), on_batch=lambda: told.append(1))
    assert divergence.batches == len(told) == 3


@pytest.mark.slow
def test_memory_stays_near_two_forward_passes() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(65536, 32)
    for dtype in (torch.float16, torch.bfloat16):
        mixed = amp.convert(model, x[:2], dtype=dtype)
        with torch.no_grad():
            forward = peak_bytes(lambda: model(x))
        whole = peak_bytes(lambda m=mixed: on(m, x, x, autocast=False))
        assert forward == 2 * x.nbytes
        assert whole < 2.6 * forward  # the nudged inputs of the noise arm, for one


def test_the_graph_that_runs_with_gradients_on_is_judged_as_well() -> None:
    """A fault that the tuned graph does not have: nobody would see it without gradients."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(16, 8)
    mixed = amp.convert(model, x, train=False)
    graph = mixed.rewritten[""]["eval"].graph_module
    [output] = graph.graph.find_nodes(op="output")
    [result] = output.args[0]
    with graph.graph.inserting_before(output):
        wrong = graph.graph.call_function(torch.ops.aten.neg.default, (result,))
    output.args = ((wrong,),)
    graph.recompile()
    found = compare(mixed, [((x,), {}, None)])
    [judged], [untuned] = found.outputs, found.untuned_outputs
    assert judged.rel_l2 < 1e-2
    assert untuned.rel_l2 > 0.5
