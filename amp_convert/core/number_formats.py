"""Names and limits of the floating point dtypes that the tool plans with.

Reports and rules files use PyTorch's own names without the prefix (`float16`); this module is the
one place that translates between names and `torch.dtype`.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import fx

LOW_DTYPES = (torch.float16, torch.bfloat16)
LOW_NAMES = ("float16", "bfloat16")
FULL = "float32"
"""The name of the format that everything else is held against."""


def name_of(dtype: torch.dtype) -> str:
    """`torch.float16` -> `"float16"`."""
    return str(dtype).removeprefix("torch.")


def from_name(name: str) -> torch.dtype:
    """`"float16"` -> `torch.float16`. Raises AttributeError for an unknown name."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise AttributeError(f"torch.{name} is not a dtype")
    return dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def ulp_at(dtype: torch.dtype, value: float) -> float:
    """The distance from |`value`| to the next larger number of `dtype`; NaN and infinity pass."""
    limits = torch.finfo(dtype)
    if not math.isfinite(value):
        return value
    exponent = math.frexp(max(abs(value), limits.smallest_normal))[1] - 1
    return math.ldexp(limits.eps, exponent)


def castable(dtype: torch.dtype) -> bool:
    """Whether the tool may cast a value of this dtype: FP32 and the low dtypes, nothing else.

    Integer, boolean, complex and FP64 values are never cast: the model asked for them by name.
    """
    return dtype == torch.float32 or dtype in LOW_DTYPES


def widened(arguments: Any) -> Any:
    """The arguments of a call in a graph, with FP32 for every low dtype among them."""
    return fx.node.map_aggregate(arguments, lambda a: torch.float32 if a in LOW_DTYPES else a)


def is_float_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether `value` is a real floating point tensor, of any width."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def nudged(tensor: torch.Tensor, coin: torch.Generator) -> torch.Tensor:
    """FP32's own noise: a tensor with every number moved to a neighbour, up or down by a coin, a
    generator on the CPU; a tensor that is not FP32 as it is."""
    if tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
        return tensor
    up = torch.randint(2, tensor.shape, generator=coin, dtype=torch.bool).to(tensor.device)
    ends = torch.where(up, math.inf, -math.inf).to(tensor.dtype)
    return torch.nextafter(tensor.detach(), ends)
