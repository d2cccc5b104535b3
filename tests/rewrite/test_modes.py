"""A converted model in its two modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from tests.bits import assert_same_bits, same_bits
from tests.rewrite.small_net import net


def test_modes_switch_graphs() -> None:
    model, x = net()
    mixed = amp.convert(model, x)
    mixed.eval()
    assert torch.equal(mixed(x), mixed(x)), "dropout is inactive, statistics are used as they are"
    before = model.norm.running_mean.clone()
    mixed(x)
    assert torch.equal(model.norm.running_mean, before)
    mixed.train()
    assert not torch.equal(mixed(x), mixed(x)), "dropout is active"
    assert int(model.norm.num_batches_tracked) == 2
    assert not torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("rules", ["fp32", "default"])
def test_batch_norm_statistics_move_as_in_eager_mode(rules: str) -> None:
    (model, x), (twin, _) = net(), net()
    mixed = amp.convert(model, x, rules=rules).train()
    twin.train()
    for step in range(3):
        mixed(x + step)
        twin(x + step)
    exact = rules == "fp32"
    for key, want in twin.norm.state_dict().items():
        have = mixed.norm.state_dict()[key]
        assert have.dtype == want.dtype
        if exact or not want.is_floating_point():
            assert same_bits(want, have), key
        else:
            torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_converted_model_has_the_originals_mode() -> None:
    model, x = net()
    assert amp.convert(model.train(), x).training
    assert not amp.convert(model.eval(), x).training


def test_the_original_follows_the_mode() -> None:
    """They share their submodules: a root in another mode than its layers would make no sense."""
    model, x = net()
    mixed = amp.convert(model.train(), x)
    mixed.eval()
    assert {m.training for m in model.modules()} == {False}
    mixed.train()
    assert {m.training for m in model.modules()} == {True}


class EvalOnly(nn.Module):
    """Cannot be exported in training mode, and has no parts that could be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        if self.training and y.sum() > 0:
            return y * 2
        return y


class DropsLayers(nn.Module):
    """Draws in training which layers it runs, as wav2vec 2.0 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.3:
                x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fp32", "autocast"])
def test_a_model_that_cannot_be_captured_whole_for_training_trains_in_parts(rules: str) -> None:
    torch.manual_seed(0)
    model, x = DropsLayers(), torch.randn(16, 8)
    mixed = amp.convert(model, x, rules=rules, dtype=torch.bfloat16)
    assert mixed.captured.is_whole
    assert mixed.captured.training is not None
    parts = [region.path for region in mixed.captured.training.regions]
    assert parts == ["layers.0", "layers.1", "layers.2", "head"]
    (train,) = [found for found in mixed.captured.fidelity if found.mode == "train"]
    assert train.status == "identical"
    assert "captured in parts for training, since in training its control flow" in train.reason
    assert {d.low for d in mixed.plan.train if "linear" in d.node} == {rules == "autocast"}

    def step(of: nn.Module, *, autocast: bool = False) -> Any:
        of.train().zero_grad()
        torch.manual_seed(1)  # which layers run
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = of(x)
        result.float().square().sum().backward()
        return result.detach().float(), {name: p.grad for name, p in model.named_parameters()}

    want = copy.deepcopy(step(model, autocast=rules == "autocast"))
    assert_same_bits(want, step(mixed))
    # One part in eval mode, as where a backbone is frozen, is then the original.
    model.layers[0].eval()
    mixed(x)
    whole = copy.deepcopy(mixed)
    assert whole.captured.training is not None
    with torch.no_grad():
        assert_same_bits(mixed.eval()(x), mixed.freeze()(x))


def test_a_model_captured_for_inference_only_refuses_to_train() -> None:
    torch.manual_seed(0)
    model, x = EvalOnly(), torch.randn(3, 4)
    mixed = amp.convert(model, x)
    train = next(f for f in mixed.captured.fidelity if f.mode == "train")
    assert train.status == "unchecked"
    assert "Guard" in train.reason or "data-dependent" in train.reason
    torch.testing.assert_close(mixed.eval()(x), model.eval()(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(UnsupportedModelError, match="captured for inference only"):
        mixed.train()(x)


@pytest.mark.slow
def test_conversion_leaves_the_original_as_it_was() -> None:
    model, x = net()
    model.train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    handle = model.last.register_forward_hook(lambda *_: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = dict(model.last._forward_hooks)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    seed = torch.get_rng_state()
    amp.convert(model, x, calibration=[x, x * 2])
    assert torch.equal(torch.get_rng_state(), seed)
    assert [m.training for m in model.modules()] == flags
    assert model.last._forward_hooks == hooks
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    assert not model.first.weight.requires_grad
    assert_same_bits(state, dict(model.state_dict()))
    handle.remove()
