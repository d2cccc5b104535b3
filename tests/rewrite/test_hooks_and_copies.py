"""What happens to a converted model later: hooks, replaced parts, copies and files."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from tests.bits import assert_same_bits, tensors
from tests.zoo import build

X = torch.linspace(-2, 2, 32).reshape(4, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))) + x


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3)).eval()


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hook_at_capture_is_in_the_graph() -> None:
    model = net()
    model[0].a.register_forward_hook(lambda module, inputs, output: output * 2)
    expected = model(X)
    mixed = amp.convert(model, X)
    assert mixed.captured.is_whole
    assert (mixed(X) - expected).abs().max() < 1e-2 * expected.abs().max()
    assert torch.equal(amp.convert(model, X, rules="fp32")(X), expected)


@pytest.mark.slow
def test_a_hook_that_comes_later_runs_and_sees_each_call_once() -> None:
    model, seen = net(), []
    mixed = amp.convert(model, X)
    before, plan = mixed(X), mixed.plan
    handle = model[1].a.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pre = model[1].b.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert torch.allclose(mixed(X), before, atol=1e-3)
    assert [tuple(value.shape) for value in seen] == [(4, 8), (4, 8)]
    assert [region.path for region in mixed.captured.regions] == ["0", "1.a", "1.b", "2"]
    low = {d.node: d.low for d in plan.eval}
    again = {d.node: d.low for d in mixed.plan.eval}
    assert again == {node: low[node] for node in again}
    mixed(X)
    assert len(seen) == 4
    handle.remove(), pre.remove()
    assert torch.equal(mixed(X), before)
    assert mixed.captured.is_whole
    assert len(seen) == 4


@pytest.mark.slow
def test_a_hook_that_changes_a_value_counts() -> None:
    model = net()
    mixed = amp.convert(model, X, rules="fp32")
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(mixed(X), model(X))


def plus_one(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def minus_one(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output - 1


@pytest.mark.slow
def test_a_hook_in_place_of_another_is_another() -> None:
    model = net()
    handle = model[1].register_forward_hook(plus_one)
    mixed = amp.convert(model, X, rules="fp32")
    handle.remove()
    model[1].register_forward_hook(minus_one)
    assert torch.equal(mixed(X), model(X))


@pytest.mark.slow
def test_a_hook_on_a_module_with_two_paths_runs_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Sequential(nn.Linear(8, 8))
            self.q = nn.Sequential(self.p[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.q(torch.relu(self.p(x))))

    torch.manual_seed(0)
    model = Twice().eval()
    mixed = amp.convert(model, X, rules="fp32")
    model.p[0].register_forward_hook(plus_one)
    assert torch.equal(mixed(X), model(X))


@pytest.mark.slow
@pytest.mark.parametrize("called", [False, True])
def test_a_later_hook_is_in_what_is_made_of_the_model(called: bool) -> None:
    """Whether or not it was called since."""
    model = net()
    mixed = amp.convert(model, X, rules="fp32")
    model[1].a.register_forward_hook(plus_one)
    if called:
        mixed(X)
    expected = model(X)
    assert torch.equal(mixed.freeze()(X), expected)
    assert torch.equal(copy.deepcopy(mixed)(X), expected)
    assert not amp.compare(model, mixed, [X]).outputs[0].max_abs_err
    with pytest.raises(amp.UnsupportedModelError):
        amp.export_onnx(mixed, "m.onnx")


@pytest.mark.slow
def test_a_copy_loses_a_hook_as_the_model_does() -> None:
    model = net()
    mixed = amp.convert(model, X, rules="fp32")
    expected = mixed(X)
    handle = model[1].a.register_forward_hook(plus_one)
    again = copy.deepcopy(mixed)
    again.captured.model[1].a._forward_hooks.clear()
    assert torch.equal(again(X), expected)
    handle.remove()
    assert torch.equal(mixed(X), expected)


@pytest.mark.slow
def test_a_hook_in_a_model_of_parts_runs_once() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.last(h if h.sum() > 0 else -h)

    torch.manual_seed(0)
    model = Branching().eval()
    model.first.register_forward_hook(lambda module, inputs, output: output * 2)
    mixed = amp.convert(model, X, rules="fp32")
    assert not mixed.captured.is_whole
    assert torch.equal(mixed(X), model(X))


# --- replaced parts ------------------------------------------------------------------------------


def test_a_submodule_that_was_replaced_is_an_error() -> None:
    model = net()
    mixed = amp.convert(model, X)
    model[1].b = nn.Linear(8, 8)
    with pytest.raises(amp.ModelError) as caught:
        mixed(X)
    assert str(caught.value) == (
        "the submodule b was replaced after the model was captured (at 1). Convert the model anew."
    )


@pytest.mark.slow
def test_another_parameter_is_not_a_replaced_part() -> None:
    model = net()
    mixed = amp.convert(model, X, rules="fp32")
    model[2].weight = nn.Parameter(torch.zeros(3, 8))
    assert torch.equal(mixed(X), model(X))


# --- copies and files ----------------------------------------------------------------------------


def stored(mixed: Any) -> Any:
    file = io.BytesIO()
    torch.save(mixed, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copied"), [("cnn", copy.deepcopy), ("gpt2", stored)], ids=["deepcopy", "torch.save"]
)
def test_a_copy_gives_the_same_bits_and_is_its_own(name: str, copied: Any) -> None:
    model, args, kwargs = build(name)
    mixed = amp.convert(model.eval(), args, kwargs)
    expected = mixed(*args, **kwargs)
    other = copied(mixed)
    assert isinstance(other, amp.ConvertedModel)
    assert (other.plan, other.training) == (mixed.plan, mixed.training)
    assert_same_bits(tensors(other(*args, **kwargs)), tensors(expected))
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert_same_bits(tensors(mixed(*args, **kwargs)), tensors(expected))
    frozen = copied(mixed.freeze())
    assert_same_bits(tensors(frozen(*args, **kwargs)), tensors(mixed.freeze()(*args, **kwargs)))


# --- inference alone -----------------------------------------------------------------------------


def test_without_training_the_model_is_in_eval_mode() -> None:
    model = net().train()
    mixed = amp.convert(model, X, train=False)
    assert not mixed.training
    assert not any(module.training for module in model.modules())
    assert mixed(X).shape == (4, 3)
