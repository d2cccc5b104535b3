"""Small models that tests plan and rewrite, each captured once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.staged import Staged


class Block(nn.Module):
    """A residual branch with a normalisation, and a softmax on top."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(F.gelu(self.norm(self.up(x))))).softmax(-1)


class Cnn(nn.Module):
    """Two convolutions with BatchNorm, one ReLU for both, and a mean before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.b1(self.c1(x)))
        x = self.act(self.b2(self.c2(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention by hand, with a boolean mask and a softmax that its author wants in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = torch.arange(x.shape[1]) < lengths[:, None]
        scores = (q @ k.transpose(1, 2)) * 0.35
        scores = torch.where(seen[:, None, :], scores, scores.min() - 10)
        return self.out(scores.float().softmax(-1) @ v)


class Gated(nn.Module):
    """A denied and a low branch that meet before a product; outputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        gate, value = self.a(x).split(4, -1)
        gate = torch.exp(gate)
        gate = gate / (gate.sum(-1, keepdim=True) + 1)
        joined = torch.cat([torch.relu(gate), torch.tanh(value) * self.scale], -1)
        return {"y": self.b(joined), "gate": gate, "count": (x > 0).sum(), "none": None}


class Residual(nn.Module):
    """The sum is between two products whatever becomes of `tanh`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"act": nn.Tanh()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(self.inner["act"](h) + h)


class Chained(nn.Module):
    """exp denies `sigmoid` and, through it, a product that lies between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.sigmoid(torch.exp(h)) * h)


class Faint(nn.Module):
    """The product is small, though its input, or its weight, is not."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4, bias=False))
        nn.init.constant_(self.part[0].weight, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def ramp(*shape: int) -> torch.Tensor:
    """Numbers from -1 to 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


EXAMPLES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "block": (Block, (ramp(2, 8),)),
    "cnn": (Cnn, (ramp(2, 1, 8, 8),)),
    "attention": (Attention, (ramp(2, 3, 8), torch.tensor([2, 3]))),
    "gated": (Gated, (ramp(2, 8),)),
    "residual": (Residual, (ramp(2, 8),)),
    "chained": (Chained, (ramp(2, 8),)),
}


@cache
def example(name: str) -> Staged:
    """One of `EXAMPLES`, captured and calibrated on its own inputs."""
    build, inputs = EXAMPLES[name]
    torch.manual_seed(0)
    return Staged.of(build(), *inputs)
