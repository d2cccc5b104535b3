"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from amp_convert.plan.costs import Casts
from tests.small_models import ramp
from tests.staged import Staged


class Classifier(nn.Module):
    """A convolutional network that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return F.softmax(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), -1)


class Block(nn.Module):
    """Attention and a feed-forward part by hand, a softmax at the end, and a loss of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
        y = F.softmax(x + self.down(F.gelu(self.up(x))), -1)
        return y, F.mse_loss(y, target)


INPUTS = {
    "cnn": (ramp(2, 1, 8, 8),),
    "block": (ramp(2, 3, 8), ramp(2, 3, 8).flip(0).softmax(-1)),
}


def build(name: str, norm: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> nn.Module:
    """A model with uneven weights in its normalisation; `norm` rounds them."""
    torch.manual_seed(0)
    model = Classifier() if name == "cnn" else Block()
    assert isinstance(model.norm, nn.Module)
    with torch.no_grad():
        for tensor in (*model.norm.parameters(), *model.norm.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(norm(torch.rand_like(tensor) + 0.5))
    return model


@cache
def staged(name: str) -> Staged:
    return Staged.of(build(name), *INPUTS[name])


def run(model: nn.Module, inputs: Iterable[torch.Tensor]) -> Any:
    with torch.no_grad():
        return model(*inputs)


CASTS = {
    ("apex-o1", "cnn"): Casts(2, 3, 5),
    ("apex-o1", "block"): Casts(8, 6, 14),
    ("apex-o2", "cnn"): Casts(2, 3, 5),
    ("apex-o2", "block"): Casts(4, 6, 11),
    ("apex-o3", "cnn"): Casts(2, 3, 5),
    ("apex-o3", "block"): Casts(4, 6, 11),
}


def as_float(outputs: Any) -> Any:
    return pytree.tree_map(lambda t: t.float(), outputs)
