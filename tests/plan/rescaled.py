"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.plan.plan import Plan
from amp_convert.report.records import NodeRecord
from amp_convert.rules.rule_set import Rules
from tests.staged import F16, Staged


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


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            self.first.weight.mul_(1e5)
            self.last.weight.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.dropout(F.max_pool2d(F.relu(self.first(x)), 2), 0.1, self.training))


def convolutions() -> Staged:
    torch.manual_seed(0)
    return Staged.of(Convolutions(), torch.randn(2, 3, 12, 12))
