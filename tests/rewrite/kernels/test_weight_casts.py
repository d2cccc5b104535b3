"""Weights of a block are cast by one call, with the gradients of casts one by one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import amp_convert as amp
from amp_convert.rewrite.kernels import weight_casts
from amp_convert.rewrite.kernels.weight_casts import cast_together
from tests.benchmarks.dispatch import counted
from tests.bits import assert_same_bits
from tests.zoo import DTYPES, both_dtypes


def _tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 5), torch.randn(4, 6).t(), torch.randn(()), torch.randn(0, 2)]


@both_dtypes
def test_values_layouts_and_gradients(dtype: torch.dtype) -> None:
    one, together = ([t.clone().requires_grad_() for t in _tensors()] for _ in range(2))
    want, have = [t.to(dtype) for t in one], cast_together(dtype, *together)
    assert_same_bits([t.detach() for t in want], [t.detach() for t in have])
    assert [t.stride() for t in want] == [t.stride() for t in have]
    for made, leaves in ((want, one), (have, together)):
        (made[0].square().sum() + made[1].sum()).backward()
        assert leaves[2].grad is leaves[3].grad is None
    assert_same_bits([t.grad for t in one[:2]], [t.grad for t in together[:2]])


@both_dtypes
def test_what_is_frozen_asks_for_no_gradient(dtype: torch.dtype) -> None:
    frozen, free = torch.randn(3), torch.randn(3, requires_grad=True)
    made = cast_together(dtype, frozen, free)
    assert [t.requires_grad for t in made] == [False, True]
    with torch.no_grad():
        assert not any(t.requires_grad for t in cast_together(dtype, free, free))
    assert torch.autograd.grad(made[1].sum(), free)[0].dtype is torch.float32


def test_a_second_derivative() -> None:
    x, y = (torch.randn(3, dtype=torch.double).float().requires_grad_() for _ in range(2))
    a, b = cast_together(torch.bfloat16, x, y)
    (first,) = torch.autograd.grad((a * a * b).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * y.detach(), rtol=2e-2, atol=1e-2)


def test_a_tensor_of_a_subclass_is_cast_by_its_own_word() -> None:
    class Own(torch.Tensor):
        pass

    own = torch.randn(3).as_subclass(Own)
    made = cast_together(torch.bfloat16, own, torch.randn(2))
    assert type(made[0]) is Own
    assert made[0].dtype is torch.bfloat16


def test_each_gradient_comes_in_the_dtype_of_its_own_weight() -> None:
    """A block may hold weights of several dtypes: FP32's gradient must not pass through FP16."""
    low = torch.ones(2, dtype=torch.float16, requires_grad=True)
    wide = torch.ones(2, requires_grad=True)
    for scale in (1e-9, 1e5):
        made = cast_together(torch.bfloat16, low, wide)
        (found,) = torch.autograd.grad((made[1].float() * scale).sum(), wide)
        torch.testing.assert_close(found, torch.full((2,), scale), rtol=1e-2, atol=0)


@pytest.mark.slow
def test_gradients_that_are_not_there_and_those_of_a_batch() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> None:
            return None

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).train(), torch.randn(2, 3)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, rules="autocast")
    Stop.apply(mixed(x)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    wanted = list(model.parameters())
    each = torch.eye(6).view(6, 2, 3)
    whole = torch.autograd.grad(mixed(x), wanted, each, is_grads_batched=True)
    singly = [torch.autograd.grad(mixed(x), wanted, one) for one in each]
    for made, parts in zip(whole, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(made, torch.stack(parts))


@pytest.mark.slow
def test_derivatives_that_are_carried_forward() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).train(), torch.randn(2, 3)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, rules="autocast")
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p.detach(), torch.ones_like(p))
            for name, p in model.named_parameters()
        }
        tangents = [
            forward_ad.unpack_dual(torch.func.functional_call(call, duals, (x,))).tangent
            for call in (model, mixed)
        ]
    torch.testing.assert_close(tangents[0], tangents[1], rtol=5e-2, atol=5e-2)


@pytest.mark.slow
def test_a_trace_of_a_training_model_can_be_saved() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).train(), torch.randn(2, 3)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, rules="autocast")
    traced = torch.jit.trace(mixed, (x,), check_trace=False)
    torch.jit.save(traced, buffer := io.BytesIO())
    buffer.seek(0)
    assert_same_bits(mixed(x).detach(), torch.jit.load(buffer)(x).detach())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_a_block(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Blocks().train(), torch.randn(4, 8)
    mixed = amp.convert(model, x, dtype=dtype)
    assert counted(lambda: mixed(x)).calls["_foreach_copy_"] == 4
    loss = mixed(x).sum()
    assert counted(loss.backward).calls["_foreach_copy_"] == 4


@pytest.mark.slow
def test_a_large_block_is_cast_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_casts, "LARGEST", 64 + 8)
    model, x = Blocks().train(), torch.randn(4, 8)
    mixed = amp.convert(model, x, dtype=torch.bfloat16)
    # Two layers of 72 numbers a block, and the head.
    assert counted(lambda: mixed(x)).calls["_foreach_copy_"] == 3 * 2 + 1


@pytest.mark.slow
def test_a_gradient_comes_while_the_backward_pass_runs() -> None:
    """What a hook on a late layer sees: its gradient is there, that of an early one is not."""
    model, x = Blocks().train(), torch.randn(4, 8)
    mixed = amp.convert(model, x, dtype=torch.bfloat16)
    seen: list[bool] = []
    late, early = model.layers[2][0].weight, model.layers[0][0].weight
    late.register_post_accumulate_grad_hook(lambda p: seen.append(early.grad is None))
    mixed(x).sum().backward()
    assert seen == [True]
    assert early.grad is not None


@pytest.mark.slow
def test_frozen_layers_train_no_weight() -> None:
    torch.manual_seed(0)
    model, x = Blocks().train(), torch.randn(4, 8)
    for p in model.layers[0][0].parameters():
        p.requires_grad_(False)
    mixed = amp.convert(model, x, dtype=torch.bfloat16)
    mixed(x).sum().backward()
    assert model.layers[0][0].weight.grad is None
    assert model.layers[0][2].weight.grad is not None


@both_dtypes
def test_steps_are_those_of_casts_one_by_one(dtype: torch.dtype) -> None:
    """Against `torch.autocast`, which casts each weight by itself: the same bits after a step."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).train(), torch.randn(4, 8)
    native = copy.deepcopy(model)
    mixed = amp.convert(model, x, dtype=dtype, rules="autocast")
    for call, context in ((mixed, False), (native, True)):
        optimizer = torch.optim.SGD(call.parameters(), 0.1)
        for _ in range(3):
            with torch.autocast("cpu", dtype=dtype, enabled=context):
                loss = call(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(list(native.parameters()), list(mixed.parameters()))
