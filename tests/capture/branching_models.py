"""What tests of this folder share."""

from __future__ import annotations

import torch
from torch import nn


class Branching(nn.Module):
    """A branch that depends on values between two parts; one part is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(8, 8), Stubborn()])
        self.last = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.first(x)
        if y.sum() > 1e9:
            y = -y
        y = self.blocks[1](self.blocks[0](self.blocks[0](y)))
        return {"y": self.last(y) * self.scale}


class Stubborn(nn.Module):
    """Cannot be captured itself, but its layer can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() > 1e9:
            x = x / 2
        return self.inner(x)


def branching() -> Branching:
    torch.manual_seed(0)
    return Branching().eval()
