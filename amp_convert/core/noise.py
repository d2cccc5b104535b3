"""FP32's own noise: every number moved to a neighbour, up or down by a coin."""

from __future__ import annotations

import math

import torch


def nudged(tensor: torch.Tensor, coin: torch.Generator) -> torch.Tensor:
    """An FP32 tensor with every number moved by one ULP; any other tensor as it is. `coin` is a
    generator on the CPU."""
    if tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
        return tensor
    up = torch.randint(2, tensor.shape, generator=coin, dtype=torch.bool).to(tensor.device)
    ends = torch.where(up, math.inf, -math.inf).to(tensor.dtype)
    return torch.nextafter(tensor.detach(), ends)
