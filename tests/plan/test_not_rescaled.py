"""Where nothing is rescaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rewrites, Rules
from tests.plan.rescaled import (
    Biasless,
    FeedForward,
    attention,
    error,
    feed_forward,
    guards_of,
    scaled,
)
from tests.staged import BF16, Staged

OFF = replace(load_rules(["default"]), rewrites=Rewrites(clamp_masks=True))


def only(rewrite: str) -> Rules:
    return replace(OFF, rewrites=replace(OFF.rewrites, **{rewrite: True}))


LEFT_ALONE: dict[str, Callable[[FeedForward, torch.Tensor], torch.Tensor]] = {
    "another function": lambda m, x: m.middle(F.gelu(m.up(x))),
    "a sum": lambda m, x: m.middle(m.up(x) + 1.0),
    "an output": lambda m, x: m.up(x),
    "also an output": lambda m, x: (lambda h: m.middle(h) + h.sum())(m.up(x)),
    "a normalisation": lambda m, x: F.layer_norm(m.up(x), (64,)),
    "as a weight": lambda m, x: F.linear(x.repeat(1, 2), m.up(x)),
    "a number between layers": lambda m, x: m.middle(m.up(x) / 1e4),
}


class Net(FeedForward):
    compute: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x / 4)


@pytest.mark.slow
@pytest.mark.parametrize("compute", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_cannot_take_the_factor_back_is_left_alone(
    compute: Callable[..., torch.Tensor],
) -> None:
    torch.manual_seed(0)
    model = Net()
    model.compute = compute
    of = Staged.of(model, torch.randn(16, 32))
    assert scaled(of.plan()) == {}
    assert "guard activation-range" in guards_of(of.plan())


@pytest.mark.slow
def test_scores_that_their_own_rounding_spoils_stay_in_fp32() -> None:
    """Scores of up to 170: an error of 0.04 in one is 4 % of its probability."""
    of = attention(lambda scores: scores / 4096.0)
    assert scaled(of.plan()) == {}
    assert guards_of(of.plan()) == {"guard activation-range"}


@pytest.mark.slow
def test_a_value_divided_by_itself_is_left_alone() -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x[:1] @ x[:1].t()
            return self.last(h / h.detach() * x)

    torch.manual_seed(0)
    of = Staged.of(Ratio(), 100 * torch.randn(4, 64))
    assert scaled(of.plan()) == {}
    assert error(of) < 2e-3


@pytest.mark.slow
def test_scores_that_are_a_mask_as_well_are_left_alone() -> None:
    """Far below zero they leave the range even when they are scaled."""

    class Masked(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.transpose(-1, -2) / 4.0).softmax(-1) @ v

    torch.manual_seed(0)
    q, k, v = (
        10 * torch.randn(2, 16, 64).abs(),
        0.03 * torch.randn(2, 16, 64),
        torch.randn(2, 16, 8),
    )
    k[:, 8:] *= 3e4
    k[:, 8:] = -k[:, 8:].abs()
    of = Staged.of(Masked(), q, k, v)
    assert scaled(of.plan()) == {}
    assert error(of) < 2e-3


@pytest.mark.slow
def test_an_outlier_channel_does_not_push_the_other_weights_out() -> None:
    """One channel of weights of 40, the others of 2e-4; the next layer ignores the one."""
    torch.manual_seed(0)
    first, last = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.randn(64, 64) * 2e-4)
        first.weight[63] = torch.rand(64) * 40
        last.weight[:, 63] = 0
    of = Staged.of(nn.Sequential(first, nn.ReLU(), last), 3e3 * torch.randn(32, 64).abs())
    assert scaled(of.plan()) == {}
    assert error(of) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.75])
def test_training_knows_the_range_behind_a_dropout(share: float) -> None:
    """The eval graph has none: in training it is that of what the dropout reads, scaled up."""
    torch.manual_seed(0)
    first, last = nn.Linear(32, 64), nn.Linear(64, 4)
    with torch.no_grad():
        first.weight.mul_(6e4)
    of = Staged.of(nn.Sequential(first, nn.ReLU(), nn.Dropout(share), last), torch.randn(16, 32))
    mixed = of.convert(OFF).train()
    assert mixed(*of.args).isfinite().all()
    assert [d.low for d in of.plan(OFF).train if d.op == "aten.linear"] == [False, False]


@pytest.mark.slow
def test_each_is_switched_by_its_own_rule() -> None:
    scores, layers = attention(), feed_forward()
    assert scaled(scores.plan(only("scale_scores")))
    assert not scaled(scores.plan(only("rescale_layers")))
    assert scaled(layers.plan(only("rescale_layers")))
    assert not scaled(layers.plan(only("scale_scores")))


@pytest.mark.slow
def test_in_range_nothing_is_scaled() -> None:
    for of in (attention(), feed_forward()):
        assert scaled(of.plan("default", BF16)) == {}
        assert scaled(of.plan("autocast")) == {}
    torch.manual_seed(0)
    model = FeedForward()
    with torch.no_grad():
        model.up.weight.div_(1e4), model.up.bias.div_(1e4)
    assert scaled(Staged.of(model, torch.randn(16, 32)).plan()) == {}


def test_weights_that_would_turn_subnormal_are_left_alone() -> None:
    """Values of 1e5 from weights of 1e-3: an eighth of them keeps too few digits."""
    torch.manual_seed(0)
    model = Biasless()
    with torch.no_grad():
        model.weight.mul_(5e-7)
    of = Staged.of(model, torch.randn(16, 32) * 3e6)
    assert scaled(of.plan()) == {}
    assert "guard activation-range" in guards_of(of.plan())


@pytest.mark.slow
@pytest.mark.parametrize("headroom", [2.0, 16.0])
def test_a_saved_plan_scales_as_the_first_did(headroom: float, tmp_path: Any) -> None:
    default = load_rules(["default"])
    rules = replace(default, guards=replace(default.guards, activation_headroom=headroom))
    for of in (attention(), feed_forward()):
        first = of.plan(rules)
        file = tmp_path / "plan.toml"
        file.write_text(first.to_toml(), encoding="utf-8")
        again = of.plan(load_rules([str(file)]))
        assert scaled(again) == scaled(first)
        assert [d.low for d in again.eval] == [d.low for d in first.eval]
        assert [d.reason for d in again.eval] == [d.reason for d in first.eval]


@pytest.mark.slow
@given(
    up=st.floats(1.0, 1e9), middle=st.floats(1e-3, 1e3), seed=st.integers(0, 3), bias=st.booleans()
)
@settings(max_examples=15)
def test_whatever_the_sizes_the_result_is_right(
    up: float, middle: float, seed: int, bias: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 16, bias), nn.ReLU(), nn.Linear(16, 16, bias), nn.ReLU(), nn.Linear(16, 4)
    )
    with torch.no_grad():
        model[0].weight.mul_(up)
        model[2].weight.mul_(middle)
    of = Staged.of(model, torch.randn(8, 8))
    assert error(of) < 5e-3
