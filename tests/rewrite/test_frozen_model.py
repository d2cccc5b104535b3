"""The frozen model as a module of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from tests.bits import assert_same_bits
from tests.rewrite.perceptron import perceptron
from tests.zoo import converted, example, mode


@pytest.mark.slow
def test_it_refuses_to_train() -> None:
    frozen = converted("cnn").freeze()
    assert not any(m.training for m in frozen.modules())
    for call in (frozen.train, lambda: frozen.train(True)):
        with pytest.raises(UnsupportedModelError, match="for inference only"):
            call()
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen
    assert not any(m.training for m in frozen.modules())
    result = frozen(*example("cnn")[1])
    assert not result.requires_grad


@pytest.mark.slow
def test_freezing_a_model_in_training_mode_freezes_its_eval_graph() -> None:
    mixed = converted("lstm")
    _, args, _ = example("lstm")
    with mode(mixed), torch.no_grad():
        want = mixed(*args)
    with mode(mixed, train=True):
        frozen = mixed.freeze()
        assert mixed.training
    assert_same_bits(want, frozen(*args))


def test_the_converted_model_is_left_as_it_was() -> None:
    model, x = perceptron()
    mixed = amp.convert(model, x)
    mixed.eval()
    before, state = mixed(x), {k: v.clone() for k, v in mixed.state_dict().items()}
    nodes = [str(n) for n in mixed.rewritten[""]["eval"].graph_module.graph.nodes]
    mixed.freeze()
    assert nodes == [str(n) for n in mixed.rewritten[""]["eval"].graph_module.graph.nodes]
    assert_same_bits(state, dict(mixed.state_dict()))
    assert_same_bits(before.detach(), mixed(x).detach())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in mixed.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fp32", "default"])
def test_it_does_not_follow_later_weights(rules: str) -> None:
    model, x = perceptron()
    model = nn.Sequential(model, nn.BatchNorm1d(64)).eval()
    frozen = amp.convert(model, x, rules=rules).freeze()
    want = frozen(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    assert_same_bits(want, frozen(x))


def test_copies_and_attributes() -> None:
    frozen = converted("cnn").freeze()
    args = example("cnn")[1]
    twin = copy.deepcopy(frozen)
    assert_same_bits(frozen(*args), twin(*args))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert not torch.equal(frozen(*args), twin(*args))


class Counting(nn.Module):
    """Changes a buffer in eval mode, as a cache or a step counter does."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_a_buffer_that_the_model_changes_stays_state() -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(2, 4)
    mixed = amp.convert(model, x)
    frozen = mixed.freeze()
    first, second = frozen(x), frozen(x)
    torch.testing.assert_close(second, 2 * first, rtol=1e-2, atol=1e-3)
    assert float(frozen.state_dict()["calls"]) == 2
    assert float(model.calls) == 0


@pytest.mark.slow
def test_fold_keeps_what_is_random() -> None:
    """Noise made from a weight's shape is not a constant."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.rand_like(self.linear.bias)

    torch.manual_seed(0)
    mixed = amp.convert(Noisy().eval(), torch.randn(2, 4))
    frozen = mixed.freeze()
    x = torch.randn(2, 4)
    assert not torch.equal(frozen(x), frozen(x))
