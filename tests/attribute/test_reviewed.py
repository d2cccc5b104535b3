"""What a reviewer found: outputs, operators and models that a budget was wrong about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Budget

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def made(forward: Callable[..., Any]) -> Net:
    torch.manual_seed(0)
    return Net(forward).eval()


def budget_of(forward: Callable[..., Any], x: torch.Tensor = X, **options: Any) -> Budget:
    mixed = amp.convert(made(forward), x, train=False)
    return attribute(mixed, (x,), {}, **options)


def _complex(m: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(m.b(m.a(x).relu()))


def _masked(m: Net, x: torch.Tensor) -> torch.Tensor:
    mask = torch.arange(16) % 3 == 0
    return m.b(m.a(x).relu()).masked_fill(mask, float("-inf"))


def _half_used(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    _, mean = torch.var_mean(y, -1, keepdim=True)
    return m.b(y - mean)


def _recurrent_first(m: Net, x: torch.Tensor) -> torch.Tensor:
    _, (last, _) = m.lstm(x[:, None])
    return m.b(last[-1])


def _detached(m: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.a(x).relu()
    return m.b(y)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("forward", [_complex, _masked, _half_used, _recurrent_first, _detached])
def test_the_prediction_is_right(forward: Callable[..., Any], casts: bool) -> None:
    found = budget_of(forward, casts=casts)
    assert found.doubts == ()
    assert found.outputs == ("output",)
    assert 0.6 < found.additivity < 1.6


def test_a_part_that_the_model_detaches_carries_its_error_on() -> None:
    found = {node.node: node.rel_l2 for node in budget_of(_detached).nodes}
    assert len([error for error in found.values() if error > 1e-5]) == 2


def _pooled(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.c(m.b(m.a(x).relu()).relu().mean(0))


def test_where_samples_meet_their_errors_go_together() -> None:
    """Of one set, held against rounding one layer by hand: the same rounded weights err alike."""
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    budget = budget_of(_pooled, x)
    assert budget.vectors == 32
    found = {node.layer: node.rel_l2 for node in budget.nodes}
    model = made(_pooled)
    with torch.no_grad():
        want = model(x)
        read = model.a(x).relu().half()  # as a low node hands it on
        low = nn.functional.linear(read, model.b.weight.half(), model.b.bias.half())
        exact = model.b(read.float())
        have, right = (model.c(y.float().relu().mean(0)) for y in (low, exact))
    error = float((have - right).norm() / want.norm())
    assert 0.6 < found["b"] / error < 1.6


def _compared(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    z = m.b(y - y.mean(0))
    return torch.cat([z, -z], -1)


def test_samples_that_meet_are_seen_where_equal_numbers_would_cancel() -> None:
    """Each value is there with both signs, so ones on a sample tell nothing of it."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    assert budget_of(_compared, x).vectors == 32
    assert budget_of(lambda m, x: m.b(m.a(x)), x).vectors == 8


class Counts(nn.Module):
    """Captured in parts, and counts its calls in a buffer that its output is a multiple of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        y = self.a(x)
        if float(y.sum()) > 1e9:
            y = y * 2
        return self.b(y) * self.calls


@pytest.mark.slow
def test_a_buffer_that_parts_write_to_starts_anew_for_each_run() -> None:
    torch.manual_seed(0)
    model = Counts().eval()
    mixed = amp.convert(model, X, train=False)
    assert not mixed.captured.is_whole
    found = attribute(mixed, (X,), {})
    assert found.doubts == ()
    assert 0.6 < found.additivity < 1.6
    assert model.calls == 0


@pytest.mark.slow
def test_what_refuses_gradients_is_one_clear_error() -> None:
    class Leaves(Counts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(torch.from_numpy(y.numpy() * 2) if float(y.sum()) < 1e9 else y)

    torch.manual_seed(0)
    mixed = amp.convert(Leaves().eval(), X, train=False)
    with pytest.raises(amp.UnsupportedModelError, match="fails with gradients on"):
        amp.error_budget(mixed, X)
