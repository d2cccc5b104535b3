"""Control flow that depends on values, and layers that are made on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify, squares


def blobs(g: torch.Generator) -> Batch:
    """Points around four centres."""
    label = torch.randint(4, (64,), generator=g)
    centres = 2 * torch.eye(16)[:4]
    return centres[label] + torch.randn(64, 16, generator=g), label


class EarlyExit(nn.Module):
    """Stops as soon as a head is sure of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(i, 32), nn.ReLU()) for i in (16, 32, 32)
        )
        self.heads = nn.ModuleList(nn.Linear(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        found: list[Tensor] = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            found.append(head(x))
            if not self.training and found[-1].softmax(-1).amax(-1).mean() > 0.8:
                break
        return found if self.training else found[-1]


def each_exit(outputs: Any, target: Tensor) -> Tensor:
    exits = outputs if isinstance(outputs, list) else [outputs]
    return torch.stack([F.cross_entropy(out, target) for out in exits]).mean()


class Branches(nn.Module):
    """One of two branches by torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.calm, self.wild = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        h = torch.cond(
            x[0, 6] > 0,
            lambda h: self.wild(h).tanh(),
            lambda h: self.calm(h).relu(),
            (h,),
        )
        return self.head(h)


class Ponder(nn.Module):
    """Repeats a layer until it wants to halt."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell = nn.Linear(16, 32), nn.GRUCell(32, 32)
        self.halt, self.head = nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        h, left, out, steps = torch.zeros_like(x), torch.ones(len(x), 1), torch.zeros_like(x), 0
        while left.max() > 0.05 and steps < 12:
            h = self.cell(x, h)
            stop = self.halt(h).sigmoid()
            out = out + left * stop * h
            left = left * (1 - stop)
            steps += 1
        return self.head(out + left * h)


def lines(g: torch.Generator) -> Batch:
    """Points of a parabola to learn from, and others to say."""
    shape = torch.randn(16, 3, generator=g)
    x, asked = torch.rand(16, 12, 1, generator=g), torch.rand(16, 8, 1, generator=g)

    def y(x: Tensor) -> Tensor:
        return shape[:, None, :1] + shape[:, None, 1:2] * x + shape[:, None, 2:] * x**2

    return (torch.cat([x, y(x)], 2), asked), y(asked)


class Hypernetwork(nn.Module):
    """A set of points makes the weights of a network that is then asked for others."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64))
        self.weights = nn.Linear(64, 16 + 16 + 16 * 16 + 16 + 16 + 1)

    def forward(self, known: Tensor, asked: Tensor) -> Tensor:
        made = self.weights(self.read(known).mean(1))
        one, b1, two, b2, three, b3 = made.split([16, 16, 256, 16, 16, 1], 1)
        h = (asked @ one[:, None] + b1[:, None]).relu()
        h = (torch.bmm(h, two.view(-1, 16, 16) / 4) + b2[:, None]).relu()
        return torch.bmm(h, three[..., None]) + b3[:, None]


class DynamicFilter(nn.Module):
    """A convolution whose kernels an image makes for itself, by groups."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.kernels = nn.Linear(8, 8 * 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x).relu()
        kernels = self.kernels(h.mean((2, 3))).view(-1, 1, 3, 3)
        joined = h.flatten(0, 1)[None]
        h = F.conv2d(joined, kernels, padding=1, groups=joined.size(1)).view_as(h)
        return self.head(h.relu().amax((2, 3)))


def bars(g: torch.Generator) -> Batch:
    """Images with a bar in one of four directions."""
    label = torch.randint(4, (32,), generator=g)
    eye, bar = torch.eye(9), torch.zeros(9, 9)
    bar[4] = 1
    images = torch.stack([bar, bar.T, eye, eye.flip(1)])[label][:, None]
    return images + 0.2 * torch.randn(images.shape, generator=g), label


KINDS = (
    Kind("control-early-exit", "control flow", EarlyExit, blobs, each_exit),
    Kind("control-cond", "control flow", Branches, blobs, classify),
    Kind("control-ponder", "control flow", Ponder, blobs, classify),
    Kind("hypernetwork-linear", "generated weights", Hypernetwork, lines, squares),
    Kind("hypernetwork-conv", "generated weights", DynamicFilter, bars, classify, rate=1e-2),
)
