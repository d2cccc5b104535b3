"""Positions, rotary angles, time steps and coordinates: FP16 cannot count beyond 2048."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, Built, Net, conv, linear, trap


def rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """`x` turned by angles, half against half."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def sinusoids_of_5000_positions() -> Built:
    """Positions made in the dtype of the activations."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        place = torch.arange(h.shape[1], dtype=h.dtype)[:, None] * net.frequency
        return net.head(h + torch.cat([place.sin(), place.cos()], -1))

    frequency = torch.logspace(0, -3, 8)
    parts = {"embed": linear(4, 16), "head": linear(16, 4), "frequency": frequency}
    return Net(compute, **parts), (torch.randn(1, 5000, 4),)


@trap(H16 | HB16, share=0.5)
def rotary_angles_from_einsum() -> Built:
    """GPT-NeoX's angles: an outer product that autocast takes for a matrix product."""

    def compute(net: nn.Module, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        angle = torch.einsum("i,j->ij", place.float(), net.inv_freq)
        q, k, v = net.qkv(x).chunk(3, -1)
        q, k = rotated(q, angle), rotated(k, angle)
        return net.out((q @ k.transpose(-2, -1) / 4).softmax(-1) @ v)

    parts = {"qkv": linear(16, 48), "out": linear(16, 8), "inv_freq": torch.logspace(0, -2, 8)}
    return Net(compute, **parts), (torch.randn(2, 16, 16), torch.arange(3001, 8000, 317))


@trap(A16 | H16 | AB16 | HB16, share=0.5)
def rotary_angles_from_matmul() -> Built:
    """Llama's angles, without its guard against autocast."""

    def compute(net: nn.Module, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        angle = (net.inv_freq[None, :, None] @ place[:, None, :].float()).transpose(1, 2)
        q, k, v = net.qkv(x).chunk(3, -1)
        q, k = rotated(q, angle), rotated(k, angle)
        return net.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])

    parts = {"qkv": linear(16, 48), "out": linear(16, 8), "inv_freq": torch.logspace(0, -2, 8)}
    return Net(compute, **parts), (torch.randn(2, 16, 16), torch.arange(3001, 8000, 317)[None])


@trap(H16 | HB16, share=0.99)
def rotary_as_complex_numbers() -> Built:
    """The first Llama's view_as_complex."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k = net.q(x), net.k(x)
        turn = torch.polar(torch.ones_like(net.angle), net.angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for t in (q, k)
        )
        return net.out((q @ k.transpose(-2, -1) / 4).softmax(-1) @ x)

    angle = torch.outer(torch.arange(16) * 250.0, torch.logspace(0, -2, 8))
    parts = {"q": linear(16, 16), "k": linear(16, 16), "out": linear(16, 8), "angle": angle}
    return Net(compute, **parts), (torch.randn(2, 16, 16),)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def flow_matching_time_steps() -> Built:
    """Sines and cosines of 1000 times a time in [0, 1], made in the dtype of the sample."""

    def compute(net: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = net.stem(x)
        rate = torch.exp(-math.log(100) * torch.arange(8, dtype=h.dtype) / 8)
        angle = 1000 * time[:, None].to(h.dtype) * rate
        shift = net.shift(torch.cat([angle.cos(), angle.sin()], -1))
        return net.last(h + shift[:, :, None, None])

    parts = {"stem": conv(3, 8), "last": conv(8, 3)}
    parts["shift"] = linear(16, 8, 3.0)
    times = torch.tensor([0.99917, 0.87139, 0.53331, 0.74123])
    return Net(compute, **parts), (torch.randn(4, 3, 8, 8), times)


@trap(A16 | H16 | AB16 | HB16, share=0.5)
def random_fourier_features() -> Built:
    """Coordinates times a matrix of frequencies, as a matrix product before a sine."""

    def compute(net: nn.Module, place: torch.Tensor) -> torch.Tensor:
        angle = (2 * math.pi * place) @ net.frequency
        h = torch.cat([angle.sin(), angle.cos()], -1)
        return net.colour(F.relu(net.hidden(h)))

    frequency = torch.randn(2, 16) * 60
    parts = {"hidden": linear(32, 32), "colour": linear(32, 3), "frequency": frequency}
    return Net(compute, **parts), (torch.rand(40, 2),)


@trap(H16 | HB16, share=0.99)
def cells_of_a_large_image() -> Built:
    """Offsets within a cell of a grid of pixels, beyond pixel 2048."""

    def compute(net: nn.Module, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        cell = place // 16
        inside = place - cell * 16
        return net.last(F.relu(net.first(torch.cat([x, inside / 8 - 1], -1))))

    place = torch.rand(40, 2) * 1000 + 3000
    return Net(compute, first=linear(6, 32), last=linear(32, 4)), (torch.randn(40, 4), place)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def anchor_grid_of_a_detector() -> Built:
    """Box corners around the cells of a strided grid, relative to a crop that starts at 4000."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.backbone(x)
        along = (torch.arange(h.shape[-1], dtype=h.dtype) + 500.5) * 8
        centre = torch.stack(torch.meshgrid(along, along, indexing="ij"))
        return centre + torch.tanh(net.head(h)) * 4 - 4004.5

    return Net(compute, backbone=conv(3, 8), head=conv(8, 2)), (torch.randn(2, 3, 4, 4),)


@trap(H16 | HB16, share=0.99)
def float_ids_and_their_remainders() -> Built:
    """Ids that travel as floats, hashed into a table."""

    def compute(net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        bucket = torch.remainder(ids * 3 + 7, 64).long()
        return net.head(F.relu(net.hidden(net.table(bucket))))

    parts = {"table": nn.Embedding(64, 16), "hidden": linear(16, 32), "head": linear(32, 4)}
    return Net(compute, **parts), (torch.randint(3000, 20000, (4, 10)).float(),)


@trap(H16 | HB16, share=0.99)
def token_ids_beyond_65504() -> Built:
    """A vocabulary larger than FP16's range, with ids given as floats."""

    def compute(net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return net.head(F.relu(net.hidden(net.table(ids.long()))))

    parts = {"table": nn.Embedding(70000, 8), "hidden": linear(8, 32), "head": linear(32, 4)}
    return Net(compute, **parts), (torch.randint(60000, 70000, (4, 10)).float(),)


@trap(H16 | HB16, share=0.99)
def sampling_grid_of_a_wide_image() -> Built:
    """grid_sample on 4096 columns: a step of FP16 is half a pixel and more."""

    def compute(net: nn.Module, image: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        flow = torch.tanh(net.flow(x)) * 1e-6
        grid = net.grid + torch.stack([flow[..., 0], torch.zeros_like(flow[..., 0])], -1)
        warped = F.grid_sample(image, grid, align_corners=True)
        return net.last(warped.flatten(2).transpose(1, 2))

    columns = torch.randint(2100, 4000, (1, 1, 50)) + 0.3
    grid = torch.stack([columns / 4095 * 2 - 1, torch.zeros(1, 1, 50)], -1)
    parts = {"flow": linear(4, 1), "last": linear(3, 4), "grid": grid}
    return Net(compute, **parts), (torch.randn(1, 3, 2, 4096), torch.randn(1, 1, 50, 4))


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def relative_position_buckets() -> Built:
    """T5's buckets: the logarithm of a distance, truncated to an integer."""

    def compute(net: nn.Module, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        apart = query[:, None].to(h.dtype) - torch.arange(16, dtype=h.dtype) * 3
        log = torch.log(apart / 16) / math.log(4096 / 16) * 16
        bias = net.bias((16 + log).long().clamp(max=31)).squeeze(-1)
        return net.out((h @ h.transpose(1, 2) / 4 + bias).softmax(-1) @ h)

    table = nn.Embedding(32, 1)
    nn.init.normal_(table.weight, std=3.0)
    query = torch.tensor([70, 75, 4090, 2901, 2903, 2915, 1037, 1031, 501, 517, 61, 230, 180] * 2)
    parts = {"embed": linear(8, 16), "out": linear(16, 4), "bias": table}
    return Net(compute, **parts), (torch.randn(2, 16, 8), query[:16])


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def alibi_far_into_a_cache() -> Built:
    """Distances of positions beyond 3000, times a slope."""

    def compute(net: nn.Module, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        seat = place.to(q.dtype)
        scores = q @ k.transpose(-2, -1) / 4 - (seat[:, None] - seat).abs() * 0.7
        return net.out(scores.softmax(-1) @ v)

    parts = {"qkv": linear(16, 48), "out": linear(16, 8)}
    return Net(compute, **parts), (torch.randn(2, 16, 16), torch.arange(3001, 3017))


@trap(H16 | HB16, share=0.99)
def resampling_by_hand() -> Built:
    """Linear interpolation at places near 3000: the fraction is lost."""

    def compute(net: nn.Module, signal: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        low = torch.floor(place)
        share = place - low
        a, b = signal[low.long()], signal[low.long() + 1]
        return net.last(F.relu(net.first(a * (1 - share)[:, None] + b * share[:, None])))

    place = torch.rand(60) * 900 + 3000
    return Net(compute, first=linear(4, 32), last=linear(32, 3)), (torch.randn(4096, 4), place)
