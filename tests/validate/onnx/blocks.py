"""What tests of this folder share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with CUDA, ONNX Runtime has kernels for FP16 and BF16"
)


class Block(nn.Module):
    """What a transformer's block is made of, small."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.gelu(self.up(self.norm(x)))
        y = x + self.down(hidden)
        return {"y": y, "largest": y.argmax(-1)}
