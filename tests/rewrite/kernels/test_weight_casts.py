"""Weights of a block are cast by one call, with the gradients of casts one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.rewrite.kernels.weight_casts import cast_together
from tests.benchmarks.dispatch import counted
from tests.zoo import DTYPES, assert_same_bits, both_dtypes


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_a_block(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Blocks().train(), torch.randn(4, 8)
    mixed = amp.convert(model, x, dtype=dtype)
    assert counted(lambda: mixed(x)).calls["_foreach_copy_"] == 4
    loss = mixed(x).sum()
    assert counted(loss.backward).calls["_foreach_copy_"] == 4


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
