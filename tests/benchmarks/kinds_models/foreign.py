"""Parts that are not plain PyTorch: other frameworks, other number formats, other classes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.control import blobs
from tests.benchmarks.kinds_models.kind import Batch, Kind, classify


def keras_sequential() -> nn.Module:
    """A Sequential of Keras, on PyTorch."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(32, "relu"),
            layers.LayerNormalization(),
            layers.Dropout(0.1),
            layers.Dense(4),
        ]
    )


def quantised() -> nn.Module:
    """The first layers run with 8-bit weights, as torch.ao leaves them."""
    body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    small = torch.ao.quantization.quantize_dynamic(body.eval(), {nn.Linear}, torch.qint8)
    return nn.Sequential(small, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def points(g: torch.Generator) -> Batch:
    return blobs(g)[0], None


class Scripted(nn.Module):
    """Its recurrent cell is TorchScript, for speed."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.jit.script(nn.GRUCell(4, 32))
        self.mix = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for part in x.unflatten(1, (4, 4)).unbind(1):
            h = self.cell(part, h)
        return self.head(self.mix(h))


class Spike(torch.autograd.Function):
    """A step, whose gradient is that of a smooth one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (1 + 10 * x.abs()) ** 2


class Spiking(nn.Module):
    """Neurons that leak, fire and are reset; the head reads how often they fired."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.new_zeros(2, len(x), 64).unbind(0)
        fired = torch.zeros_like(b)
        for _ in range(10):
            a = 0.9 * a + self.one(x)
            spikes = Spike.apply(a - 1)
            a = a - spikes
            b = 0.9 * b + self.two(spikes)
            out = Spike.apply(b - 1)
            b = b - out
            fired = fired + out
        return self.head(fired / 10)


class Prediction:
    """What a model says, as a class of its own."""

    def __init__(self, logits: Tensor, embedding: Tensor) -> None:
        self.logits, self.embedding = logits, embedding


class OwnClass(nn.Module):
    """Returns an object."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Prediction:
        h = self.body(x)
        return Prediction(self.head(h), h)


def own_loss(outputs: Prediction, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, target)


class ThroughNumpy(nn.Module):
    """Takes the median of what it has made, with NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        h = self.body(x)
        middle = torch.from_numpy(np.median(h.detach().cpu().numpy(), axis=0))
        return self.head(h - middle)


@torch.library.custom_op("kinds::soft_limit", mutates_args=())
def soft_limit(x: Tensor) -> Tensor:
    """x / (1 + |x|), without a fake implementation."""
    return x / (1 + x.abs())


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: Tensor) -> Tensor:
    return grad / (1 + ctx.saved_tensors[0].abs()) ** 2


torch.library.register_autograd("kinds::soft_limit", _back, setup_context=_keep)


class OwnOperator(nn.Module):
    """Uses an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(soft_limit(self.two(soft_limit(self.one(x)))))


class OwnOnly(nn.Module):
    """Nothing but an operator of its own: no part of it can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return soft_limit(x) @ self.weight


KINDS = (
    Kind("foreign-keras", "foreign", keras_sequential, blobs, classify, package="keras"),
    Kind("foreign-quantised", "foreign", quantised, points),
    Kind("foreign-scripted", "foreign", Scripted, blobs, classify),
    Kind("spiking-surrogate", "spiking", Spiking, blobs, classify),
    Kind("foreign-own-class", "foreign", OwnClass, blobs, own_loss),
    Kind("foreign-numpy", "foreign", ThroughNumpy, blobs, classify),
    Kind("foreign-own-operator", "foreign", OwnOperator, blobs, classify),
    Kind("foreign-own-only", "foreign", OwnOnly, blobs, classify),
)
