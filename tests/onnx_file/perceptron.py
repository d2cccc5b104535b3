"""What tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp


class Perceptron(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


def perceptron(dtype: torch.dtype = torch.float16, **options: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Perceptron(**options).eval(), torch.randn(4, options.get("width", 64))
    return amp.convert(model, x, dtype=dtype), x
