"""FP32 and autocast rules on models that are tried here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from tests.bits import assert_same_bits, same_bits
from tests.property.identity_runs import (
    FURTHER,
    equal,
    in_fp32,
    run_on,
)
from tests.zoo import Example, both_dtypes, fused_transformer

every_further = pytest.mark.parametrize("further", FURTHER)


@pytest.mark.slow
@every_further
def test_fp32_rules_change_nothing_in_further_models(built: Example) -> None:
    original, args, _ = built
    mixed = amp.convert(original, args, rules="fp32")
    for train in (False, True):
        want, have = (run_on(call, built, train=train) for call in (original, mixed))
        assert want.gradients
        assert_same_bits([want.outputs, want.gradients], [have.outputs, have.gradients])


@pytest.mark.slow
@every_further
@both_dtypes
def test_autocast_rules_are_autocast_in_further_models(
    further: str, built: Example, dtype: torch.dtype
) -> None:
    original, args, _ = built
    mixed = amp.convert(original, args, dtype=dtype, rules="autocast", train=False)
    assert mixed.plan.low_nodes() > 0

    def eager(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return in_fp32(original(*args))

    with torch.no_grad(), fused_transformer(False):
        have, want = mixed(*args), eager(*args)
        if further != "gru":
            assert_same_bits(want, have)
        else:
            # CPU autocast has no word on aten.gru: it casts the products in it, and carries the
            # state on in FP32. Ours has the whole operator, and with it the state, low.
            assert not equal(want, have)
            assert_same_bits(eager(args[0], args[1].to(dtype)), have)


@pytest.mark.slow
@both_dtypes
def test_what_autocast_rules_change_in_gradients(dtype: torch.dtype) -> None:
    """A value that several products read is cast once, and autocast casts it for each: the sum of
    its gradients is then taken in the low dtype, in place of FP32."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)).eval()
    norm, x = nn.LayerNorm(16), torch.randn(4, 16)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linears = norm, model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return sum(linear(y) for linear in self.linears)

    shared = Shared().eval()
    mixed = amp.convert(shared, x, dtype=dtype, rules="autocast")

    def gradient(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(call(leaf).float().square().sum(), leaf)[0]

    def once(x: torch.Tensor) -> torch.Tensor:
        y = norm(x).to(dtype)
        return sum(linear(y) for linear in model)

    with torch.autocast("cpu", dtype=dtype):
        assert_same_bits(shared(x).float(), mixed(x))
        each, one = gradient(shared), gradient(once)
    assert_same_bits(one, gradient(mixed))
    assert not same_bits(each, one)
