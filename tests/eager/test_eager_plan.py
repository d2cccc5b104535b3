"""A plan applied to the model as it is. Oracles: the converted model, eager PyTorch and its own
autocast, bit for bit; what is dispatched, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import amp_convert as amp
from tests import bits, zoo
from tests.eager.small_net import net, plainly

F16, BF16 = torch.float16, torch.bfloat16


X = torch.linspace(-2, 2, 32).reshape(4, 8)


def as_given(tree: Any, want: Any) -> None:
    """The floating point values of two trees are the same numbers; a cache may hold low ones."""
    for path, expected in bits.leaves(want).items():
        if isinstance(expected, torch.Tensor):
            found = bits.leaves(tree)[path]
            assert bits.same_bits(expected, found.to(expected.dtype)), path


@zoo.every_model
@pytest.mark.parametrize("rules", ["default", "fp32", "autocast"])
@zoo.both_dtypes
def test_its_bits_are_those_of_the_converted_model(
    name: str, rules: str, dtype: torch.dtype
) -> None:
    model, args, kwargs = zoo.example(name)
    mixed = zoo.converted(name, rules, dtype)
    with zoo.mode(model, mixed), torch.no_grad():
        want = mixed(*args, **kwargs)
        with mixed.plan.autocast(model) as applied:
            have = model(*args, **kwargs)
    as_given(have, want)
    known = {"aten._grouped_mm", "aten.clamp"}  # of mixtral and whisper, by paths of their own
    assert {op for _, op in applied.counts.unplanned} <= known
    assert not applied.counts.held_back


@zoo.every_model
def test_a_training_step_is_that_of_the_converted_model(name: str) -> None:
    """The same outputs, and gradients that are no further off than mixed precision is itself: where
    a value has several readers, eager code casts it for each."""
    model, args, kwargs = zoo.example(name)
    mixed = zoo.converted(name, "default", BF16)

    def step(call: Callable[..., Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        found = [t for t in bits.tensors(call(*args, **kwargs)) if t.requires_grad]
        sum(t.float().square().mean() for t in found).backward()  # type: ignore[union-attr]
        grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [t.detach() for t in found], torch.cat(grads)

    def planned(*args: Any, **kwargs: Any) -> Any:
        with mixed.plan.autocast(model):
            return model(*args, **kwargs)

    with zoo.mode(model, mixed, train=True):
        (want, exact), (have, near), (_, fp32) = step(mixed), step(planned), step(model)
    assert all(bits.same_bits(w, h.to(w.dtype)) for w, h in zip(want, have, strict=True))
    assert (near - exact).norm() <= (exact - fp32).norm()


def test_fp32_rules_change_no_bit_and_autocasts_are_autocasts() -> None:
    model = net()
    same = amp.convert(model, X, rules="fp32").plan
    native = amp.convert(model, X, dtype=BF16, rules="autocast").plan
    with torch.no_grad():
        with same.autocast(model):
            assert bits.same_bits(model(X * 3), F.linear(X, X[:3]) * 0 + plainly(model, X * 3))
        with torch.autocast("cpu", dtype=BF16):
            want = model(X * 3)
        with native.autocast(model):
            assert bits.same_bits(model(X * 3), want.float())
