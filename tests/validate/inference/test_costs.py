"""Costs of the four arms: which ran, what they hold in memory, and what was left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.core.memory_meter import peak_bytes
from amp_convert.validate.inference import costs
from tests.bits import assert_same_bits
from tests.staged import rules_with

X = torch.linspace(-1, 1, 64 * 32).reshape(64, 32)
ARMS = ["fp32", "autocast", "mixed", "frozen"]


def stack() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32, bias=False), nn.ReLU())]
    return nn.Sequential(*layers).eval()


@pytest.mark.slow
def test_every_arm_is_measured() -> None:
    found = costs.measure(amp.convert(stack(), X, rules=rules_with()), (X,), {})
    assert [cost.arm for cost in found] == ARMS
    for cost in found:
        assert cost.milliseconds is not None
        assert cost.milliseconds > 0
        assert cost.note.startswith(f"median of {costs.TURNS} forward passes")


@pytest.mark.slow
def test_peak_memory_is_the_weights_and_what_a_pass_adds() -> None:
    """By hand: weights of 4 layers, two activations at a time, and casts where there are any."""
    model = stack()
    fp32, autocast, mixed, frozen = (
        cost.peak_bytes
        for cost in costs.measure(amp.convert(model, X, rules=rules_with()), (X,), {})
    )
    weights, activation = 4 * 32 * 32 * 4, 64 * 32 * 4
    with torch.no_grad():
        assert peak_bytes(lambda: model(X)) == 2 * activation
    assert fp32 == weights + 2 * activation
    # In FP16: the input's copy, a layer's result, the next one's, at half the size each; at the
    # end the FP32 result beside its FP16 source.
    assert frozen == weights // 2 + activation + activation // 2
    assert frozen < fp32
    # The FP32 master weights stay, and each is cast when it is needed.
    assert weights + activation < mixed <= weights + weights // 2 + 2 * activation
    assert autocast is not None
    assert autocast > weights


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no autocast here\nand a second line")
        return self.linear(x)


@pytest.mark.slow
def test_an_arm_that_fails_has_a_note_and_the_others_run() -> None:
    found = {cost.arm: cost for cost in costs.measure(amp.convert(Fails(), X), (X,), {})}
    assert list(found) == ARMS
    failed = found.pop("autocast")
    assert (failed.milliseconds, failed.peak_bytes) == (None, None)
    assert failed.note == "it does not run, so it has no time: no autocast here"
    assert all(cost.milliseconds and cost.peak_bytes for cost in found.values())


def test_the_first_turn_always_runs(monkeypatch: object) -> None:
    found = []
    before = costs.BUDGET_SECONDS
    try:
        costs.BUDGET_SECONDS = 0.0
        found = list(costs.measure(amp.convert(stack(), X, rules=rules_with()), (X,), {}))
    finally:
        costs.BUDGET_SECONDS = before
    assert [cost.arm for cost in found] == ARMS
    assert all(cost.note.startswith("median of 1 forward pass") for cost in found)


class Stateful(nn.Module):
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(32, 32), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.drop(self.linear(x)) + torch.rand(32)


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Stateful().train()
    model.drop.eval()
    mixed = amp.convert(model, X, rules=rules_with())
    flags = [m.training for m in (*model.modules(), *mixed.modules())]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    costs.measure(mixed, (X,), {})
    assert [m.training for m in (*model.modules(), *mixed.modules())] == flags
    assert_same_bits(state, dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), seed)
