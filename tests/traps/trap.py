"""What a trap is: a small model, its inputs, and the native routes to low precision that break it.

A builder function decorated with `trap` makes the model and the inputs; its name is the trap's. The
FP32 model is well conditioned: a mixed model that keeps the right ops in FP32 meets the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...]]
"""A model and the positional arguments of one call."""

A16, H16 = frozenset({"autocast-float16"}), frozenset({"half-float16"})
AB16, HB16 = frozenset({"autocast-bfloat16"}), frozenset({"half-bfloat16"})
NEVER: frozenset[str] = frozenset()
"""The native routes: `torch.autocast` and `model.to(dtype)`, in FP16 and in BF16."""


@dataclass(frozen=True)
class Trap:
    """`breaks` names the native routes that break; of the multiply-adds of the converted model at
    least `min_share_macs` are low, in either dtype."""

    name: str
    builder: Callable[[], Built]
    breaks: frozenset[str]
    min_share_macs: float

    def build(self) -> Built:
        """A fresh model in eval mode and its inputs, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args = self.builder()
        return model.eval(), args


TRAPS: dict[str, Trap] = {}
"""Every trap whose module has been imported, by name."""


def trap(
    breaks: frozenset[str], share: float = 0.0
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Make a builder function a trap; the arguments are those of `Trap`."""

    def register(builder: Callable[[], Built]) -> Callable[[], Built]:
        name = builder.__name__
        assert name not in TRAPS, f"two traps are called {name}"
        TRAPS[name] = Trap(name, builder, breaks, share)
        return builder

    return register


class Net(nn.Module):
    """A model in a few lines: named layers, parameters and buffers, and `compute(net, *args)`."""

    def __init__(self, compute: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *args: Any) -> Any:
        return self.compute(self, *args)


def linear(inputs: int, outputs: int, scale: float = 1.0, bias: bool = True) -> nn.Linear:
    """A linear layer whose outputs have standard deviation `scale` when its inputs have 1."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=scale / inputs**0.5)
    if bias:
        nn.init.normal_(layer.bias, std=0.1 * scale)
    return layer


def conv(inputs: int, outputs: int, scale: float = 1.0, size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size, scaled as `linear` is."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.normal_(layer.weight, std=scale / (inputs * size**2) ** 0.5)
    nn.init.normal_(layer.bias, std=0.1 * scale)
    return layer
