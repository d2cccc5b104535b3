"""The operations that random graphs are made of, each with the kinds of values that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TOKENS, CHANNELS, VOCABULARY = 4, 8, 11


class Kind(StrEnum):
    """Dtype and shape of a value; FULL is FP32 and (batch, TOKENS, CHANNELS)."""

    FULL = "full"
    THIN = "thin"  # FP32, one channel
    SCALAR = "scalar"  # FP32, no dimension
    DOUBLE = "double"
    HALF = "half"
    BRAIN = "brain"  # BF16
    INTEGER = "integer"
    BOOLEAN = "boolean"
    IDS = "ids"


@torch.library.custom_op("amp_convert_tests::damped", mutates_args=())
def damped(x: torch.Tensor) -> torch.Tensor:
    """An operator that no rules file names."""
    return x * 0.5


damped.register_fake(torch.empty_like)
damped.register_autograd(lambda _, gradient: gradient * 0.5)


@dataclass(frozen=True)
class Operation:
    """What an operation reads and makes. `call` gets its module, if it has one, then the values."""

    takes: tuple[Kind, ...]
    gives: tuple[Kind, ...]
    call: Callable[..., Any]
    module: Callable[[], nn.Module] | None = None


class Scaled(nn.Module):
    """A parameter without dimensions, which gives way to any tensor when dtypes are promoted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Shifted(nn.Module):
    """A buffer that is only read."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class Averaged(nn.Module):
    """A buffer that training changes."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return x - self.average


def _rectified(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.relu_(layer(x))


def _accumulated(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = layer(x)
    result += y
    return result


def _split(x: torch.Tensor) -> torch.Tensor:
    left, right = x.split(CHANNELS // 2, dim=-1)
    return torch.cat([right, left], dim=-1)


def _chunk(x: torch.Tensor) -> torch.Tensor:
    gate, _, value, _ = x.chunk(4, dim=-1)
    return torch.cat([gate, value] * 2, dim=-1)


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], TOKENS, CHANNELS)


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], TOKENS, 2, -1).permute(0, 2, 1, 3).flatten(1).view(x.shape)


def _masked(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return x.masked_fill(mask, value)


_linear = partial(nn.Linear, CHANNELS, CHANNELS)


_wide = partial(nn.Linear, 2 * CHANNELS, CHANNELS)


_conv = partial(nn.Conv1d, TOKENS, TOKENS, 3, padding=1)


_f, _t, _s = Kind.FULL, Kind.THIN, Kind.SCALAR


_d, _h, _b = Kind.DOUBLE, Kind.HALF, Kind.BRAIN


_i, _m = Kind.INTEGER, Kind.BOOLEAN


OPERATIONS: dict[str, Operation] = {
    # allow
    "linear": Operation((_f,), (_f,), lambda layer, x: layer(x), _linear),
    "linear_relu_": Operation((_f,), (_f,), _rectified, _linear),
    "linear_iadd": Operation((_f, _f), (_f,), _accumulated, _linear),
    "conv": Operation((_f,), (_f,), lambda layer, x: layer(x), partial(_conv, bias=False)),
    "conv_relu_": Operation((_f,), (_f,), _rectified, _conv),
    "matmul": Operation((_f, _f), (_f,), lambda x, y: x @ y.transpose(1, 2) @ y * 0.1),
    "attention": Operation((_f, _f, _f), (_f,), F.scaled_dot_product_attention),
    "cat_linear": Operation(
        (_f, _f), (_f,), lambda layer, x, y: layer(torch.cat([x, y], -1)), _wide
    ),
    # infer
    "layer_norm": Operation(
        (_f,), (_f,), lambda layer, x: layer(x), partial(nn.LayerNorm, CHANNELS)
    ),
    "plain_norm": Operation((_f,), (_f,), lambda x: F.layer_norm(x, (CHANNELS,))),
    "group_norm": Operation(
        (_f,), (_f,), lambda layer, x: layer(x), partial(nn.GroupNorm, 2, TOKENS)
    ),
    "batch_norm": Operation(
        (_f,), (_f,), lambda layer, x: layer(x), partial(nn.BatchNorm1d, TOKENS)
    ),
    "bare_batch_norm": Operation(
        (_f,),
        (_f,),
        lambda layer, x: layer(x),
        partial(nn.BatchNorm1d, TOKENS, affine=False),
    ),
    "softmax": Operation((_f,), (_f,), lambda x: x.softmax(-1)),
    "gelu": Operation((_f,), (_f,), F.gelu),
    "tanh": Operation((_f,), (_f,), torch.tanh),
    "add": Operation((_f, _f), (_f,), torch.add),
    "mul": Operation((_f, _f), (_f,), torch.mul),
    "add_thin": Operation((_f, _t), (_f,), torch.add),
    "mul_scalar": Operation((_f, _s), (_f,), torch.mul),
    "add_number": Operation((_f,), (_f,), lambda x: x + 1),
    "scaled": Operation((_f,), (_f,), lambda layer, x: layer(x), Scaled),
    "shifted": Operation((_f,), (_f,), lambda layer, x: layer(x), Shifted),
    "averaged": Operation((_f,), (_f,), lambda layer, x: layer(x), Averaged),
    "dropout": Operation((_f,), (_f,), lambda layer, x: layer(x), partial(nn.Dropout, 0.5)),
    # deny
    "exp": Operation((_f,), (_f,), lambda x: torch.exp(x.clamp(max=4.0))),
    "cumsum": Operation((_f,), (_f,), lambda x: x.cumsum(1)),
    "sum": Operation((_f,), (_t,), lambda x: x.sum(-1, keepdim=True)),
    "mean": Operation((_f,), (_t,), lambda x: x.mean(-1, keepdim=True)),
    "prod": Operation((_f,), (_t,), lambda x: x.clamp(-2, 2).prod(-1, keepdim=True)),
    "mean_all": Operation((_f,), (_s,), torch.mean),
    "square": Operation((_f,), (_f,), lambda x: x.clamp(-4, 4) ** 2),
    # clear
    "relu": Operation((_f,), (_f,), torch.relu),
    "split": Operation((_f,), (_f,), _split),
    "chunk": Operation((_f,), (_f,), _chunk),
    "turned": Operation((_f,), (_f,), _turned),
    "heads": Operation((_f,), (_f,), _heads),
    "max": Operation((_f,), (_t, _i), lambda x: x.max(-1, keepdim=True)),
    "expand": Operation((_t,), (_f,), lambda x: x.expand(-1, -1, CHANNELS)),
    "zeros": Operation((_f,), (_f,), torch.zeros_like),
    "embedding": Operation(
        (Kind.IDS,),
        (_f,),
        lambda layer, ids: layer(ids),
        partial(nn.Embedding, VOCABULARY, CHANNELS),
    ),
    # booleans and integers
    "compare": Operation((_f, _f), (_m,), torch.gt),
    "invert": Operation((_m,), (_m,), torch.logical_not),
    "where": Operation((_m, _f, _f), (_f,), torch.where),
    "masked": Operation((_f, _m), (_f,), partial(_masked, value=-1e9)),
    "blocked": Operation((_f, _m), (_f,), partial(_masked, value=0.0)),
    "argmax": Operation((_f,), (_i,), lambda x: x.argmax(-1, keepdim=True)),
    "count": Operation((_i,), (_i,), lambda i: (i * 3 + 1) % CHANNELS),
    "gather": Operation((_f, _i), (_t,), lambda x, i: x.gather(-1, i)),
    "mask_float": Operation((_m,), (_f,), lambda m: m.float()),
    "integer_float": Operation((_i,), (_t,), lambda i: i.float()),
    "integer_add": Operation((_f, _i), (_f,), torch.add),
    # explicit casts and other precisions
    "float": Operation((_f,), (_f,), lambda x: x.float()),
    "long": Operation((_f,), (_i,), lambda x: x[..., :1].clamp(0, 5).long()),
    "double": Operation((_f,), (_d,), lambda x: x.double()),
    "double_exp": Operation((_d,), (_d,), lambda x: torch.exp(-(x * x))),
    "double_add": Operation((_d, _f), (_d,), torch.add),
    "double_prod": Operation((_d,), (_d,), lambda x: x * x.tanh().prod(-1, keepdim=True)),
    "double_cat": Operation((_d, _f), (_d,), lambda x, y: torch.cat([x, y], -1)[..., ::2]),
    "double_float": Operation((_d,), (_f,), lambda x: x.float()),
    "half": Operation((_f,), (_h,), lambda x: x.half()),
    "half_relu": Operation((_h,), (_h,), lambda x: torch.relu(x) + 1),
    "half_add": Operation((_h, _f), (_f,), torch.add),
    "half_float": Operation((_h,), (_f,), lambda x: x.float()),
    "brain": Operation((_f,), (_b,), lambda x: x.bfloat16()),
    "brain_float": Operation((_b,), (_f,), lambda x: (x * 2).float()),
    # no rule names it
    "damped": Operation((_f,), (_f,), damped),
    # one weight, however often it is used
    "tied": Operation((_f,), (_f,), lambda layer, x: layer(x), _linear),
    "tied_twin": Operation((_f,), (_f,), lambda layer, x: layer(x), _linear),
}
