"""What tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Pair(nn.Module):
    """A product, its BatchNorm, and a product that reads the result."""

    def __init__(self, product: nn.Module, norm: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.product, self.norm, self.last = product, norm, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.product(x)).relu())


def pair(product: Any, norm: Any, last: Any, *shape: int) -> tuple[Pair, Tensor]:
    """The pair with statistics and weights as training leaves them, in eval mode."""
    torch.manual_seed(0)
    model, x = Pair(product(), norm(), last()), torch.randn(shape)
    for _ in range(3):
        model(x * 2 + 1)
    for tensor in (model.norm.weight, model.norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor, 1.0)
    return model.eval(), x


def convolution() -> tuple[Pair, Tensor]:
    return pair(
        lambda: nn.Conv2d(3, 8, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(8),
        lambda: nn.Conv2d(8, 4, 1), 4, 3, 8, 8,
    )  # fmt: skip
