"""Linear layers are one product of two matrices, whatever requires grad."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import amp_convert as amp
from tests.benchmarks.dispatch import counted
from tests.zoo import both_dtypes


class Transposed(nn.Module):
    """A linear layer on an input that does not lie in memory row by row."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(1, 2))


@both_dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_folded(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Transposed(bias=bias).eval(), torch.randn(6, 8, 7)
    mixed = amp.convert(model, x, dtype=dtype, train=False)
    with torch.no_grad():
        want = model(x)
        for call in (mixed, mixed.freeze()):
            calls = counted(lambda call=call: call(x)).calls
            assert calls["bmm"] == 0
            assert calls["mm"] + calls["addmm"] == 1
            assert float((call(x) - want).norm() / want.norm()) < 2e-2
            torch.testing.assert_close(call(x[:2]), call(x)[:2], rtol=2e-2, atol=2e-2)


def test_the_bits_of_eager_are_kept_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    model, x = Transposed(bias=True).eval(), torch.randn(6, 8, 7)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mixed = amp.convert(model, x, rules="fp32", train=False)
    with torch.no_grad():
        assert counted(lambda: mixed(x)).calls == counted(lambda: model(x)).calls
