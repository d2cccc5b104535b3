"""Raw quantities given to a model: times, places, samples of a distribution."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import H16, HB16, Built, Net, linear, trap


@trap(H16 | HB16, share=0.99)
def seconds_of_the_day() -> Built:
    """86399 does not fit FP16; its phase is wanted to a minute."""

    def compute(net: nn.Module, seconds: torch.Tensor) -> torch.Tensor:
        phase = seconds[:, None] * (2 * math.pi / 86400) * net.harmonic
        return net.head(F.relu(net.hidden(torch.cat([phase.sin(), phase.cos()], -1))))

    harmonic = torch.tensor([1.0, 2.0, 7.0, 24.0, 96.0])
    parts = {"hidden": linear(10, 32), "head": linear(32, 4), "harmonic": harmonic}
    return Net(compute, **parts), (torch.rand(40) * 86400,)


@trap(H16 | HB16, share=0.99)
def distances_on_the_globe() -> Built:
    """Haversine distances of places a few kilometres apart."""

    def compute(net: nn.Module, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        a, b = torch.deg2rad(here), torch.deg2rad(there)
        half = torch.sin((b - a) / 2) ** 2
        root = torch.sqrt(half[:, 0] + a[:, 0].cos() * b[:, 0].cos() * half[:, 1])
        kilometres = 2 * 6371 * torch.asin(root)
        return net.head(F.relu(net.hidden(kilometres[:, None] / 5)))

    here = torch.tensor([48.2, 16.4]) + torch.randn(40, 2) * 0.1
    there = here + torch.randn(40, 2) * 0.05
    return Net(compute, hidden=linear(1, 32), head=linear(32, 4)), (here, there)


@trap(H16 | HB16, share=0.99)
def samples_by_inverse_distribution() -> Built:
    """NeRF's fine samples: a search in the running sum of 4096 weights."""

    def compute(net: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        share = (weight + 1e-5) / (weight + 1e-5).sum(-1, keepdim=True)
        found = torch.searchsorted(torch.cumsum(share, -1), net.uniform)
        return {"index": found, "colour": net.colour(x)}

    uniform = torch.linspace(0.01, 0.99, 200).expand(2, 200).contiguous()
    return Net(compute, colour=linear(8, 3), uniform=uniform), (
        torch.rand(2, 4096),
        torch.randn(4, 8),
    )


@trap(H16, share=0.99)
def raw_pixels_of_16_bits() -> Built:
    """Values up to 65535, shifted and scaled by buffers inside the model."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = (x - net.mean) / net.deviation
        return net.head(F.relu(net.first(h)).mean((2, 3)))

    first = nn.Conv2d(3, 8, 3, stride=2)
    shape = (3, 1, 1)
    buffers = {"mean": torch.full(shape, 64000.0), "deviation": torch.full(shape, 400.0)}
    return Net(compute, first=first, head=linear(8, 4), **buffers), (
        64000 + torch.randn(2, 3, 12, 12) * 400,
    )


@trap(H16 | HB16, share=0.99)
def prices_as_log_returns() -> Built:
    """Differences of logarithms of prices that move by a thousandth."""

    def compute(net: nn.Module, price: torch.Tensor) -> torch.Tensor:
        change = torch.diff(torch.log(price), dim=-1) * 500
        return net.head(torch.tanh(net.hidden(change)))

    price = 30000 * torch.exp(torch.cumsum(torch.randn(4, 33) * 2e-3, -1))
    return Net(compute, hidden=linear(32, 64), head=linear(64, 4)), (price,)


@trap(H16 | HB16, share=0.99)
def heat_equation_steps() -> Built:
    """A solver inside a network: temperatures near 300 that move by little in each step."""

    def compute(net: nn.Module, t: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            laplacian = t.roll(1, -1) + t.roll(-1, -1) - 2 * t
            t = t + 0.1 * laplacian
        return net.head(torch.tanh(net.hidden(t - 300)))

    return Net(compute, hidden=linear(32, 64, 4.0), head=linear(64, 4)), (
        300 + torch.randn(4, 32) * 0.5,
    )
