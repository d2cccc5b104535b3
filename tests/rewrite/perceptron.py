"""What tests of this folder share."""

from __future__ import annotations

import torch
from torch import nn


def perceptron(layers: int = 4, width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    stack = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*stack[:-1]), torch.randn(8, width)
