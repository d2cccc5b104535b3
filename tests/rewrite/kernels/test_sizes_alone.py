"""What depends on sizes alone is computed once for each set of sizes, and never changes a bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.rewrite.kernels.sizes_alone import KEPT
from tests.benchmarks.dispatch import counted
from tests.bits import assert_same_bits
from tests.rewrite.kernels.running import running


class Positions(nn.Module):
    """A table of positions, read for as many rows as there are; `leak` returns them."""

    def __init__(self, *, leak: bool = False, noise: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._leak, self._noise = leak, noise

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = torch.arange(x.shape[0]).float().sin().unsqueeze(1)
        y = self.linear(x) + rows
        if self._noise:
            y = y + torch.rand(4)
        return (y, rows.expand(-1, 2)) if self._leak else (y,)


def _mixed(model: nn.Module) -> nn.Module:
    return amp.convert(model.eval(), torch.randn(3, 4), rules="fp32", train=False)


def test_they_are_computed_once_for_each_set_of_sizes() -> None:
    model = Positions()
    mixed = _mixed(model)
    with torch.no_grad():
        for rows in (3, 5, 3, *range(1, KEPT + 4), 3):
            x = torch.randn(rows, 4)
            assert_same_bits(model(x), mixed(x))
        kept = running(mixed).tuned.sizes_alone._kept
        assert len(kept) == KEPT
        x = torch.randn(3, 4)
        calls = counted(lambda: mixed(x)).calls
    assert calls == {"addmm": 1, "add_.Tensor": 1}


def test_a_caller_may_write_to_what_it_gets() -> None:
    model = Positions(leak=True)
    mixed, x = _mixed(model), torch.randn(3, 4)
    with torch.no_grad():
        want = model(x)
        mixed(x)[1].fill_(7) if mixed(x)[1].is_contiguous() else mixed(x)[1][:, 0].fill_(7)
        assert_same_bits(want, mixed(x))


@pytest.mark.slow
def test_random_numbers_are_drawn_at_each_call() -> None:
    model = Positions(noise=True)
    mixed, x = _mixed(model), torch.randn(3, 4)
    with torch.no_grad():
        torch.manual_seed(3)
        want = model(x), model(x)
        torch.manual_seed(3)
        assert_same_bits(want, (mixed(x), mixed(x)))
    assert not torch.equal(want[0][0], want[1][0])


def test_copies_forget_and_compute_anew() -> None:
    model = Positions()
    mixed, x = _mixed(model), torch.randn(3, 4)
    with torch.no_grad():
        want = mixed(x)
        twin = copy.deepcopy(mixed.freeze())
        assert running(twin).tuned.sizes_alone._kept == {}
        assert_same_bits(want, twin(x))
