"""Sums, means and distances over many or large values, and cumulative ops."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, Built, Net, linear, trap


@trap(A16 | H16, share=0.99)
def sum_pooling_overflows() -> Built:
    """The sum over 4096 tokens, then its logarithm."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.log(F.relu(net.embed(x)).sum(1)) - 10)

    return Net(compute, embed=linear(8, 16, 60.0), head=linear(16, 4)), (torch.randn(2, 4096, 8),)


@trap(A16 | H16, share=0.99)
def energy_in_decibels() -> Built:
    """The log energy of frames of an encoder's output."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.encode(x)
        return net.head((10 * torch.log10((h**2).sum(-1) + 1e-6) - 60) / 4)

    return Net(compute, encode=linear(32, 64, 100.0), head=linear(16, 4)), (
        torch.randn(2, 16, 32) * torch.rand(2, 16, 1),
    )


@trap(A16 | H16, share=0.99)
def variance_pooling_overflows() -> Built:
    """The variance of an x-vector's frames, then a scaling by its root."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.frame(x)
        return net.head(h.mean(1) / torch.sqrt(h.var(1) + 1e-5))

    return Net(compute, frame=linear(8, 16, 800.0), head=linear(16, 4)), (
        torch.randn(3, 32, 8) + torch.randn(3, 1, 8),
    )


@trap(A16 | H16, share=0.99)
def vector_norm_overflows() -> Built:
    """The length of 4096 values of 3000."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.up(x)
        return net.head((h / torch.linalg.vector_norm(h, dim=-1, keepdim=True)) * 32)

    return Net(compute, up=linear(16, 1024, 4e3), head=linear(1024, 4)), (torch.randn(2, 16),)


@trap(H16 | HB16, share=0.99)
def rbf_kernel_of_cdist() -> Built:
    """Distances between embeddings of a few thousand."""

    def compute(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        apart = torch.cdist(net.embed(x), net.embed(y))
        return net.head(torch.exp(-((apart / 3e4) ** 2)))

    parts = {"embed": linear(8, 16, 6e3), "head": linear(12, 4)}
    return Net(compute, **parts), (torch.randn(2, 10, 8), torch.randn(2, 12, 8))


@trap(A16 | H16, share=0.5)
def squared_distances_to_a_codebook() -> Built:
    """Vector quantisation: |x|² - 2x·c + |c|², of which each part passes 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = net.encode(x)
        far = z.pow(2).sum(-1, keepdim=True) - 2 * z @ net.codebook.t()
        far = far + net.codebook.pow(2).sum(-1)
        code = far.argmin(-1)
        return net.decode(net.codebook[code] / 100), code

    codebook = torch.randn(12, 16) * 100
    encode = nn.Linear(16, 16, bias=False)
    encode.weight.data = torch.eye(16) * 100
    x = codebook[torch.randint(12, (30,))] / 100 + torch.randn(30, 16) * 0.1
    return Net(compute, encode=encode, decode=linear(16, 8), codebook=codebook), (x,)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def soft_histogram_sticks() -> Built:
    """A histogram with linear weights, summed with index_put and accumulate."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        value = torch.sigmoid(net.score(x)).flatten() * 7
        low = value.floor()
        weight = value - low
        histogram = torch.zeros(9, dtype=value.dtype)
        histogram = histogram.index_put((low.long(),), 1 - weight, accumulate=True)
        histogram = histogram.index_put((low.long() + 1,), weight, accumulate=True)
        return net.head(histogram[:8] / 2048)

    return Net(compute, score=linear(8, 1, 0.5), head=linear(8, 4)), (torch.randn(16384, 8),)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def running_positions_from_a_mask() -> Built:
    """Positions as the running sum of a float mask, then their sines."""

    def compute(net: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        place = torch.cumsum(keep.to(h.dtype), 1)[..., None] * net.frequency
        return net.head(h + torch.cat([place.sin(), place.cos()], -1))

    keep = torch.rand(1, 5000) < 0.95
    frequency = torch.logspace(0, -3, 8)
    return Net(compute, embed=linear(4, 16), head=linear(16, 4), frequency=frequency), (
        torch.randn(1, 5000, 4),
        keep,
    )


@trap(A16 | H16, share=0.99)
def linear_attention_running_sums() -> Built:
    """Causal linear attention: running sums of keys and of keys times values pass 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.cumsum(k[..., :, None] * v[..., None, :], 1)
        total = torch.cumsum(k, 1)
        mixed = (q[..., :, None] * state).sum(-2) / ((q * total).sum(-1, keepdim=True) + 1e-6)
        return net.out(mixed / 10)

    qkv = linear(8, 24, 10.0)
    nn.init.constant_(qkv.bias, 10.0)
    return Net(compute, qkv=qkv, out=linear(8, 8)), (torch.randn(1, 1024, 8),)


@trap(H16 | HB16, share=0.99)
def transmittance_of_a_radiance_field() -> Built:
    """NeRF: the running product of 1 - alpha for thousands of alphas of 3e-4."""

    def compute(net: nn.Module, density: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        alpha = 1 - torch.exp(-F.relu(density) * 1e-3)
        ahead = torch.cumprod(1 - alpha + 1e-10, -1)
        weight = alpha * torch.cat([torch.ones_like(ahead[:, :1]), ahead[:, :-1]], -1)
        return net.colour((weight[..., None] * feature).sum(1))

    feature = torch.linspace(-1, 1, 4096)[None, :, None] * torch.randn(2, 1, 8)
    return Net(compute, colour=linear(8, 3)), (0.3 + torch.rand(2, 4096) * 0.02, feature)


@trap(H16 | HB16, share=0.99)
def segment_sums_of_a_state_space_model() -> Built:
    """Mamba-2: decay factors as exp of differences of running sums, which start high."""

    def compute(net: nn.Module, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        decay = torch.cumsum(-F.softplus(step), 1)
        apart = decay[:, :, None] - decay[:, None, :]
        past = torch.ones(apart.shape[1:], dtype=torch.bool).tril()
        kernel = torch.exp(apart.masked_fill(~past, -torch.inf))
        return net.out(kernel @ net.inner(x))

    step = torch.randn(2, 256) * 0.3 - 3
    step[:, 0] = 1000.0
    return Net(compute, inner=linear(8, 16), out=linear(16, 8)), (torch.randn(2, 256, 8), step)


@trap(H16 | HB16, share=0.9)
def state_space_scan_with_small_steps() -> Built:
    """A state that moves by 3e-4 in each of 24 steps."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        drive = net.drive(x)
        keep = torch.exp(-net.step)
        state = torch.ones_like(drive[:, 0])
        seen = []
        for t in range(24):
            state = keep * state + net.step * drive[:, t]
            seen.append(state)
        return net.out((torch.stack(seen, 1) - 1) * 200)

    step = nn.Parameter(torch.full((16,), 3e-4))
    return Net(compute, step=step, drive=linear(8, 16), out=linear(16, 8)), (torch.randn(2, 24, 8),)


@trap(H16 | HB16, share=0.99)
def retention_decay_to_the_power_of_distance() -> Built:
    """RetNet: gamma of 0.9998 is 1 in FP16, and nothing decays."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n = torch.arange(x.shape[1])
        apart = (n[:, None] - n).to(x.dtype)
        decay = torch.where(apart >= 0, net.gamma ** (apart * 64), 0.0)
        return net.out((decay @ net.value(x)) / 8)

    return Net(compute, value=linear(8, 16), out=linear(16, 8), gamma=torch.tensor(0.9998)), (
        torch.randn(2, 128, 8) + 1,
    )
