"""The rewrites `scale_scores` and `rescale_layers`: products out of range that need not retreat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.plan.plan import Plan
from amp_convert.report.records import NodeRecord
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rewrites, Rules
from tests.staged import BF16, F16, Staged, rows, table

OFF = replace(load_rules(["default"]), rewrites=Rewrites(clamp_masks=True))


def only(rewrite: str) -> Rules:
    return replace(OFF, rewrites=replace(OFF.rewrites, **{rewrite: True}))


def scaled(plan: Plan) -> dict[str, tuple[float, tuple[float, ...], float]]:
    """The factors of each node that has one: of its result, its tensors and its number."""
    found = {
        d.node.replace("aten.", "").removesuffix("#0"): (
            d.scale,
            NodeRecord.of(d).input_scales,
            d.number_scale,
        )
        for d in plan.eval
    }
    return {node: factors for node, factors in found.items() if factors != (1.0, (), 1.0)}


def outputs(of: Staged, rules: Rules | str = "default", dtype: torch.dtype = F16) -> torch.Tensor:
    mixed = of.convert(rules, dtype).eval()
    with torch.no_grad():
        have = mixed(*of.args)
        assert torch.equal(have, mixed.freeze()(*of.args))
    return have


def error(of: Staged, rules: Rules | str = "default", dtype: torch.dtype = F16) -> float:
    have = outputs(of, rules, dtype)
    assert have.isfinite().all()
    with torch.no_grad():
        want = of.model.eval()(*of.args)
    return float((have - want).double().norm() / want.double().norm())


def guards_of(plan: Plan) -> set[str]:
    return {d.rule for d in plan.eval if d.rule.startswith("guard")}


# --- scores --------------------------------------------------------------------------------------

SCALINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "divided": lambda scores: scores / 1e5,
    "multiplied": lambda scores: scores * 1e5**-1,
    "by a tensor": lambda scores: scores / torch.full([], 99999.5),
    "through views": lambda scores: scores.reshape(2, 1, 16, 16).transpose(-1, -2) / 1e5,
}


class Attention(nn.Module):
    """Attention with scores of up to 7e5 before they are scaled."""

    def __init__(self, scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.scale = nn.Linear(64, 192), nn.Linear(64, 64), scale
        with torch.no_grad():
            self.qkv.weight[:128].mul_(60)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.scale(q @ k.transpose(-1, -2)).reshape(2, 16, 16)
        return self.out(torch.softmax(scores, -1) @ v)


def attention(scale: Callable[[torch.Tensor], torch.Tensor] = SCALINGS["divided"]) -> Staged:
    torch.manual_seed(0)
    return Staged.of(Attention(scale), 4 * torch.randn(2, 16, 64))


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALINGS.values(), ids=SCALINGS)
def test_scores_that_are_scaled_before_are_as_good_as_in_fp32(
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    of = attention(scale)
    assert of.plan().share_macs_low() == 1
    assert guards_of(of.plan()) == set()
    assert guards_of(of.plan(OFF)) == {"guard activation-range"}
    assert of.plan(OFF).share_macs_low() < 1
    # What retreats is not rounded: scores of up to 7.
    assert error(of) <= error(of, OFF) + torch.finfo(F16).eps


@pytest.mark.slow
def test_the_whole_plan_of_scores() -> None:
    of = attention()
    assert scaled(of.plan()) == {
        "/matmul": (2.0**-7, (2.0**-7, 1.0), 1.0),
        "/div": (1.0, (), 2.0**-7),
    }
    assert table(of.plan())[-7:] == rows(
        """
        /transpose#0  | clear | op transpose | f16 | low | .
        /matmul#0     | allow | op matmul    | f16 | low | . .
        /div#0        | infer | op div       | f16 | low | .
        /reshape#0    | clear | op reshape   | f16 | low | .
        /softmax#0    | infer | op softmax   | f16 | low | .
        /matmul#1     | allow | op matmul    | f16 | low | . .
        out/linear#0  | allow | op linear    | f16 | low | . f16 f16
        """
    )
    reasons = {d.node: d.why for d in of.plan().eval if d.rewrites}
    assert reasons.keys() == {"/aten.matmul#0", "/aten.div#0"}
    assert reasons["/aten.matmul#0"].endswith(
        "its result is held times 0.0078125 (rewrite scale_scores)"
    )
    assert reasons["/aten.div#0"].endswith(
        "it takes the factor of what it reads back (rewrite scale_scores)"
    )


def test_the_bits_are_those_of_a_query_that_is_scaled_by_hand() -> None:
    of = attention()
    half = copy.deepcopy(of.model).eval().half()
    with torch.no_grad():
        q, k, v = half.qkv(of.args[0].half()).chunk(3, -1)
        scores = (q * 2.0**-7) @ k.transpose(-1, -2) / (1e5 / 128)
        want = half.out(torch.softmax(scores, -1) @ v).float()
    assert torch.equal(outputs(of), want)


# --- layers --------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Three layers, the first two of which give values of up to 4e5."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = F.relu) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        self.activation = activation
        with torch.no_grad():
            self.up.weight.mul_(3e5), self.up.bias.mul_(3e5)
            self.down.weight.mul_(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.activation(self.up(x / 4))
        return self.down(self.activation(self.middle(h)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            self.first.weight.mul_(1e5)
            self.last.weight.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.dropout(F.max_pool2d(F.relu(self.first(x)), 2), 0.1, self.training))


class Biasless(nn.Module):
    """GPT-2's layers are `addmm`, T5's have no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bias = nn.Parameter(torch.randn(64))
        self.weight = nn.Parameter(torch.randn(32, 64) * 4e3)
        self.last = nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.last.weight.mul_(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(torch.addmm(self.bias, x, self.weight)))


def feed_forward(**options: Any) -> Staged:
    torch.manual_seed(0)
    return Staged.of(FeedForward(**options), torch.randn(16, 32))


def convolutions() -> Staged:
    torch.manual_seed(0)
    return Staged.of(Convolutions(), torch.randn(2, 3, 12, 12))


def biasless() -> Staged:
    torch.manual_seed(0)
    return Staged.of(Biasless(), torch.randn(16, 32) * 4)


def scaled_by_hand(of: Staged) -> nn.Module:
    """The model of `feed_forward` in half precision, with the factors that its plan has."""
    model = copy.deepcopy(of.model)
    with torch.no_grad():
        model.up.weight.mul_(2.0**-5), model.up.bias.mul_(2.0**-5)
        model.middle.weight.mul_(2.0), model.middle.bias.mul_(2.0**-4)
        model.down.weight.mul_(16.0)
    return model.half()


MODELS = {"linear": feed_forward, "convolution": convolutions, "addmm": biasless}


@pytest.mark.slow
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_rescaled_layers_are_as_good_as_in_fp32(build: Callable[[], Staged]) -> None:
    of = build()
    assert of.plan().share_macs_low() == 1
    assert guards_of(of.plan()) == set()
    assert "guard activation-range" in guards_of(of.plan(OFF))
    assert of.plan(OFF).share_macs_low() < 1
    # What retreats is not rounded; what is rescaled is rounded as any low layer is.
    assert error(of) <= error(of, OFF) + torch.finfo(F16).eps


def test_the_whole_plan_of_layers() -> None:
    """The middle layer ends one region and begins the next."""
    up, middle = 2.0**-5, 2.0**-4
    assert scaled(feed_forward().plan()) == {
        "up/linear": (up, (1.0, up, up), 1.0),
        "/relu": (up, (), 1.0),
        "middle/linear": (middle, (1.0, middle / up, middle), 1.0),
        "/relu#1": (middle, (), 1.0),
        "down/linear": (1.0, (1.0, 1 / middle, 1.0), 1.0),
    }


def test_the_bits_are_those_of_weights_that_are_scaled_by_hand() -> None:
    of = feed_forward()
    with torch.no_grad():
        want = scaled_by_hand(of)(of.args[0].half()).float()
    assert torch.equal(outputs(of), want)


def test_layers_are_not_rescaled_in_training() -> None:
    """The gradient of the next layer's held weight is a sum of products with values near the end of
    the range: it would overflow whatever the loss scale."""
    of = feed_forward()
    assert all(d.scale == 1 for d in of.plan().train)
    want = [p.grad for p in graded(of.model.train(), of.args)]
    have = [p.grad for p in graded(of.convert().train(), of.args)]
    for expected, found in zip(want, have, strict=True):
        assert expected is not None
        assert found is not None
        assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_scores_are_scaled_in_training() -> None:
    of = attention()
    assert any(d.scale < 1 for d in of.plan().train)
    want = [p.grad for p in graded(of.model.train(), of.args)]
    have = [p.grad for p in graded(of.convert().train(), of.args)]
    for expected, found in zip(want, have, strict=True):
        assert expected is not None
        assert found is not None
        assert (found - expected).norm() <= 3e-2 * expected.norm()


def graded(model: nn.Module, args: tuple[Any, ...]) -> list[nn.Parameter]:
    """Copies of the parameters with their gradients."""
    model.zero_grad()
    model(*args).square().mean().backward()
    found = copy.deepcopy(list(model.parameters()))
    for parameter, original in zip(found, model.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    return found


@pytest.mark.slow
def test_a_node_is_compared_with_the_reference_times_its_factor() -> None:
    of = feed_forward()
    divergence = amp.compare(of.model.eval(), of.convert().eval(), [of.args])
    for row in divergence.nodes:
        assert row.accumulated_rel_l2 is not None
        assert row.accumulated_rel_l2 < 2e-3, row.node
        assert row.local_rel_l2 is not None
        assert row.local_rel_l2 < 1e-3, row.node
        assert row.overflow_fraction == 0


# --- where it is left alone ----------------------------------------------------------------------

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
