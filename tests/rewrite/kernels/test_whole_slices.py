"""Slices of the whole are left away, others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import amp_convert as amp
from tests.benchmarks.dispatch import counted
from tests.bits import assert_same_bits
from tests.rewrite.kernels.running import running, targets

CASES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "the whole, and one": (lambda x: x[:, 0, :] * 2, 0),
    "an end beyond the last": (lambda x: x[:, :9] * 2, 0),
    "a part": (lambda x: x[:, 1:] * 2, 1),
    "the first": (lambda x: x[:, :2] * 2, 1),
    "every second": (lambda x: x[:, ::2] * 2, 1),
    "the last": (lambda x: x[:, -1:] * 2, 1),
    "what is returned": (lambda x: (x * 2)[:], 1),
}


class Net(nn.Module):
    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._then(self.linear(x))


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_is_left(what: str, mode: str) -> None:
    then, left = CASES[what]
    torch.manual_seed(0)
    model, x = Net(then).train(mode == "train"), torch.randn(3, 5, 4)
    mixed = amp.convert(model, x, rules="fp32")
    assert targets(running(mixed, mode).tuned).count("slice") == left
    want, have = model(x), mixed(x)
    assert_same_bits(want.detach(), have.detach())
    found = [torch.autograd.grad(y.sum(), list(model.parameters())) for y in (want, have)]
    assert_same_bits(list(found[0]), list(found[1]))


@pytest.mark.slow
def test_a_backward_pass_as_eager_has_it() -> None:
    torch.manual_seed(0)
    model, x = Net(CASES["the whole, and one"][0]).train(), torch.randn(3, 5, 4)
    mixed = amp.convert(model, x, rules="fp32")
    found = []
    for call in (model, mixed):
        loss = call(x).sum()
        found.append(counted(loss.backward).calls)
        model.zero_grad()
    assert found[0] == found[1]
