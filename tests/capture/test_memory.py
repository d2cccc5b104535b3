"""What converting holds beside the model, in sizes of its weights: counted, not sampled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import amp_convert as amp
from amp_convert.capture import fidelity
from amp_convert.capture.regions import capture
from amp_convert.core.memory_meter import held_bytes, peak_bytes
from amp_convert.core.mode import Mode


def one() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(1024, 1024)), torch.randn(2, 1024)


def many() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(16) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(2, 256)


@pytest.mark.parametrize("build", [one, many])
@pytest.mark.parametrize(("train", "most"), [(False, 1.5), (True, 2.5)])
def test_converting_holds_so_many_times_the_weights(
    build: object, train: bool, most: float
) -> None:
    """2.5 times with the weights themselves, 3.5 times with the train graph."""
    torch.manual_seed(0)
    model, x = build()  # type: ignore[operator]
    weights = held_bytes(tuple(model.parameters()))
    peak = peak_bytes(lambda: amp.convert(model, x, train=train))
    assert peak < most * weights


def test_a_gradient_that_is_the_same_is_not_held_twice() -> None:
    torch.manual_seed(0)
    model, x = many()
    weights = held_bytes(tuple(model.parameters()))
    region = capture(model, (x,), {}).regions[0]
    runner = region.runner(Mode.TRAIN)
    kept = torch.ones(256, 256)
    model[0].weight.grad = kept

    def check() -> None:
        found = fidelity.check(model, runner, (x,), {}, Mode.TRAIN)
        assert (found.status, found.gradients) == ("identical", True)

    assert peak_bytes(check) < 1.5 * weights
    assert model[0].weight.grad is kept
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_what_hangs_on_a_gradient_does_not_run() -> None:
    """An optimizer in the backward pass would train the model while it is looked at."""
    torch.manual_seed(0)
    model, x = many()
    calls: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(calls.append)
    found = capture(model, (x,), {}).fidelity
    assert [(f.status, f.gradients) for f in found] == [("identical", True)] * 2
    assert calls == []
