"""A converted model as any other module: attributes, copies, torch.compile."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.errors import UsageError
from tests.bits import assert_same_bits, leaves
from tests.rewrite.small_net import net
from tests.zoo import DTYPES, Example, both_dtypes, build, converted, example, mode

# --- the original's other face -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float64),
    ],
    ids=["half", "double", "to", "to with a device"],
)
def test_weights_keep_their_dtypes(change: Callable[[nn.Module], nn.Module]) -> None:
    """They are the original's, which would change as well, and the plan would no longer hold."""
    model, args, kwargs = build("cnn")
    mixed = amp.convert(model, args, kwargs)
    before = copy.deepcopy(model.state_dict())
    for of in (mixed, mixed.freeze()):
        with pytest.raises(
            UsageError, match=r"keep the dtypes of its plan: float(16|32) would become"
        ):
            change(of)
    assert_same_bits(before, model.state_dict())
    assert mixed.float().to("cpu").train() is mixed


@pytest.mark.slow
def test_attributes_are_the_originals() -> None:
    bert, mixed = example("bert")[0], converted("bert")
    assert mixed.config is bert.config
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = mixed.nothing_of_the_kind


@pytest.mark.slow
def test_a_copy_is_independent() -> None:
    model, x = net()
    mixed = amp.convert(model.eval(), x)
    twin = copy.deepcopy(mixed)
    before = mixed(x)
    assert_same_bits(before, twin(x))
    with torch.no_grad():
        twin.last.weight.zero_()
        twin.last.bias.fill_(2.0)
    assert torch.equal(twin(x), torch.full((8, 3), 2.0))
    assert_same_bits(before, mixed(x))
    assert_same_bits(before, amp.convert(model, x)(x))
    twin.train()
    twin(x)
    assert int(twin.norm.num_batches_tracked) == 1
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers_are_eagers(dtype: torch.dtype) -> None:
    """Dropout of the converted model drops what dropout of the original does."""
    model, x = net()
    model.norm.momentum = 0.0
    mixed = amp.convert(model.train(), x, dtype=dtype)
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mixed(x), want, rtol=5e-2, atol=5e-2)


def without_dropout(name: str) -> Example:
    """A fresh model whose dropout drops nothing: a compiled one draws other numbers than eager."""
    model, args, kwargs = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, args, kwargs


def compiled_like_eager(mixed: nn.Module, backend: str, *args: Any, train: bool, **kw: Any) -> None:
    with mode(mixed, train=train):
        want = mixed(*args, **kw)
        expected = torch.autograd.grad(_loss(want), list(mixed.parameters()), allow_unused=True)
    torch._dynamo.reset()
    fast = torch.compile(mixed, backend=backend, fullgraph=True)
    with mode(mixed, train=train):
        have = fast(*args, **kw)
        found = torch.autograd.grad(_loss(have), list(mixed.parameters()), allow_unused=True)
    assert type(have) is type(want)
    for path, value in leaves(want).items():
        if isinstance(value, torch.Tensor):
            assert leaves(have)[path].dtype == value.dtype
            torch.testing.assert_close(leaves(have)[path], value, rtol=2e-2, atol=5e-3)
    for gradient, value in zip(found, expected, strict=True):
        assert (gradient is None) == (value is None)
        if value is not None:
            assert gradient.dtype == value.dtype
            torch.testing.assert_close(gradient, value, rtol=5e-2, atol=2e-2)


def _loss(tree: Any) -> torch.Tensor:
    floats = [t for t in pytree.tree_leaves(tree) if getattr(t, "requires_grad", False)]
    return sum((t.float().square().mean() for t in floats), torch.zeros(()))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_torch_compile(name: str, train: bool) -> None:
    """In one graph, without breaks."""
    model, args, kwargs = without_dropout(name)
    mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16)
    compiled_like_eager(mixed, "aot_eager", *args, train=train, **kwargs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torch_compile_with_inductor(train: bool) -> None:
    model, args, kwargs = without_dropout("cnn")
    mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16)
    compiled_like_eager(mixed, "inductor", *args, train=train, **kwargs)


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("train", [False, True])
def test_the_plan_holds_inside_autocast(dtype: torch.dtype, train: bool) -> None:
    """A loop written for autocast may stay as it is: what the plan keeps in FP32 stays there."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + x

    torch.manual_seed(0)
    model, x = Sum(), torch.randn(3, 8)
    for rules in ("fp32", "default"):
        mixed = amp.convert(model.train(train), x, dtype=dtype, rules=rules)
        calls = [mixed] if train else [mixed, mixed.freeze()]
        for call in calls:
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    want = call(x)
                    with torch.autocast("cpu", dtype=dtype):
                        have = call(x)
                assert have.dtype is torch.float32
                assert_same_bits(want.detach(), have.detach())
        torch._dynamo.reset()
        compiled = torch.compile(mixed, backend="eager", fullgraph=True)
        want = compiled(x)
        with torch.autocast("cpu", dtype=dtype):
            have = compiled(x)
        assert_same_bits(want.detach(), have.detach())


@pytest.mark.slow
def test_converting_leaves_buffers_that_operators_write_to_unsaid() -> None:
    """`instance_norm` writes its statistics in training, and no schema says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).train()
    eager, x = copy.deepcopy(model), torch.randn(4, 4, 8, 8)
    mixed = amp.convert(model, x, rules="fp32")
    assert_same_bits(list(eager.buffers()), list(model.buffers()))
    for call in (eager, mixed):
        call(x)
    assert float(model[0].running_mean.abs().sum()) > 0
    assert_same_bits(list(eager.buffers()), list(model.buffers()))
