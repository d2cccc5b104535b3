"""Gradients of intermediate values, against those that autograd retains."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.core.exponent_histogram import Exponents
from tests.validate.training.gradient_steps import (
    X,
    Y,
    shared,
    staged,
    step,
)


@pytest.mark.slow
def test_activation_gradients_belong_to_nodes() -> None:
    of = shared()
    watched = GradientProbe(of.captured)
    torch.manual_seed(3)
    step(of).run(watched, "FP32")
    found = {info.identity.replace("aten.", ""): seen for info, seen in watched.seen.values()}
    assert {name for name, seen in found.items() if seen.elements} == {
        "first/linear#0",
        "norm/_native_batch_norm_legit_functional#0",
        "/gelu#0",
        "drop/native_dropout#0",
        "last/linear#0",
        "/mul#0",
    }  # neither the views nor the access to the normalisation's results
    torch.manual_seed(3)
    for name, gradient in _retained(of.model).items():
        want = Exponents()
        want.add(gradient)
        assert found[name] == want, name


def _retained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The forward pass of `Net` once more, eagerly, keeping gradients."""
    model = copy.deepcopy(model).train()
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        value.retain_grad()
        kept[name] = value
        return value

    net: Any = model
    h = keep(
        "norm/_native_batch_norm_legit_functional#0", net.norm(keep("first/linear#0", net.first(X)))
    )
    h = keep("/gelu#0", F.gelu(h.view(-1, 2, 4)))
    h = keep("last/linear#0", net.last(keep("drop/native_dropout#0", net.drop(h.reshape(-1, 8)))))
    F.mse_loss(keep("/mul#0", h * net.frozen), Y).backward()
    return {name: value.grad for name, value in kept.items() if value.grad is not None}


@pytest.mark.slow
def test_a_value_that_the_loss_does_not_read_has_no_gradient() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    of = staged(Two)
    watched = GradientProbe(of.captured)
    trace = step(of, lambda out, t: F.mse_loss(out[0], t)).run(watched, "FP32")
    assert trace.gradients["b.weight"] is None
    elements = {info.layer: seen.elements for info, seen in watched.seen.values()}
    assert elements == {"a": 24, "b": 0}


def test_no_gradient_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    monkeypatch.setattr(Exponents, "add", lambda self, tensor: seen.update([str(tensor.shape)]))
    of = shared()
    watched = GradientProbe(of.captured)
    step(of).run(watched, "FP32")
    held = [v for _, e in watched.seen.values() for v in vars(e).values()]
    assert seen.total() == 6
    assert not any(isinstance(v, torch.Tensor) for v in held)
