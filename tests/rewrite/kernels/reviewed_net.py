"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """A linear layer, a norm, a buffer, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("held", torch.ones(3, width))
        self._forward = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self, *inputs)


def made(forward: Callable[..., Any], width: int = 4) -> Net:
    torch.manual_seed(0)
    return Net(forward, width).eval()
