"""`cat` with nothing in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import amp_convert as amp
from tests.bits import assert_same_bits
from tests.rewrite.kernels.running import running, targets


class Cached(nn.Module):
    """Joins what it computes to a cache that is still empty."""

    def __init__(self, *, returned: bool, wide: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._returned, self._dtype = returned, torch.float64 if wide else torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        joined = torch.cat([torch.tensor([], dtype=self._dtype), y], -1)
        return joined if self._returned else joined * 2


@pytest.mark.slow
def test_an_empty_part_is_left_away() -> None:
    x = torch.randn(3, 4)
    for returned, wide, left in ((False, False, 0), (True, False, 1), (False, True, 1)):
        model = Cached(returned=returned, wide=wide).eval()
        mixed = amp.convert(model, x, rules="fp32", train=False)
        with torch.no_grad():
            assert_same_bits(model(x), mixed(x))
        assert targets(running(mixed.freeze()).tuned).count("cat") == left, (returned, wide)


def test_what_may_ask_for_a_gradient_stays_in_training() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.empty, x]).exp()

    model, x = Joined().train(), torch.randn(4)
    mixed = amp.convert(model, x, rules="fp32")
    mixed(x).sum().backward()
    assert model.empty.grad is not None
    assert model.empty.grad.shape == (0,)
