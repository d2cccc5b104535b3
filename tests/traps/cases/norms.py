"""Normalisation: large values, tiny ones, tiny variances and running statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, NEVER, Built, Net, conv, linear, trap


@trap(A16 | H16, share=0.99)
def rms_norm_squares_overflow() -> Built:
    """T5's and Llama's norm without its upcast: squares of a few hundred pass 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.up(x)
        return net.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    return Net(compute, up=linear(16, 32, 500.0), down=linear(32, 8)), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.99)
def layer_norm_by_hand_overflows() -> Built:
    """The annotated transformer's LayerNorm on values around 1000."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.up(x)
        centred = h - h.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return net.down(net.gain * centred / torch.sqrt(variance + 1e-6))

    parts = {"up": linear(16, 32, 1000.0), "down": linear(32, 8)}
    return Net(compute, gain=nn.Parameter(torch.ones(32)), **parts), (torch.randn(4, 16),)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def variance_as_difference_of_means() -> Built:
    """E[x²] - E[x]² of values around 30: the difference of two numbers near 900."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.up(x)
        mean = h.mean(-1, keepdim=True)
        variance = (h * h).mean(-1, keepdim=True) - mean * mean
        return net.down((h - mean) / torch.sqrt(variance + 1e-5))

    up = linear(16, 64, 1.5)
    nn.init.constant_(up.bias, 30.0)
    return Net(compute, up=up, down=linear(64, 8)), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.75)
def layer_norm_of_values_beyond_range() -> Built:
    """The product before a LayerNorm passes 65504; what follows the norm is small again."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(F.gelu(net.down(net.norm(net.up(x)))))

    parts = {"up": linear(16, 32, 5e4), "down": linear(32, 32), "last": linear(32, 32)}
    return Net(compute, norm=nn.LayerNorm(32), **parts), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.6)
def group_norm_in_a_vae_decoder() -> Built:
    """A residual block of a decoder whose convolution passes 65504 before the next GroupNorm."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        h = h + net.inner(F.silu(net.norm1(h)))
        return net.last(net.outer(F.silu(net.norm2(h))))

    norms = {f"norm{i}": nn.GroupNorm(4, 8, eps=1e-6) for i in (1, 2)}
    parts = {"first": conv(4, 8), "inner": conv(8, 8, 5e4), "outer": conv(8, 8), "last": conv(8, 3)}
    return Net(compute, **norms, **parts), (torch.randn(2, 4, 8, 8),)


@trap(H16, share=0.99)
def instance_norm_of_raw_counts() -> Built:
    """Counts of a scanner, up to 1e5, normalised inside the model."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(F.relu(net.first(net.norm(x))))

    parts = {"norm": nn.InstanceNorm2d(2, affine=True), "first": conv(2, 8), "last": conv(8, 2)}
    return Net(compute, **parts), (torch.rand(2, 2, 8, 8) * 1.5e5,)


@trap(H16, share=0.99)
def batch_norm_tiny_running_variance() -> Built:
    """Field strengths of 3e-5: the running variance, 1e-9, is zero in FP16."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(F.relu(net.norm(net.first(x))).flatten(1))

    norm = nn.BatchNorm1d(8, eps=1e-12)
    norm.running_var.fill_(1e-9)
    first = nn.Conv1d(2, 8, 3, bias=False)
    return Net(compute, first=first, norm=norm, head=linear(8 * 14, 4)), (
        torch.randn(3, 2, 16) * 5e-5,
    )


@trap(H16, share=0.99)
def batch_norm_without_affine_on_raw_features() -> Built:
    """BatchNorm as the scaler of raw columns, whose mean and variance do not fit FP16."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(F.relu(net.hidden(net.scaler(x))))

    scaler = nn.BatchNorm1d(8, affine=False)
    mean, deviation = torch.rand(8) * 3e5, 1e4 + torch.rand(8) * 4e4
    scaler.running_mean.copy_(mean)
    scaler.running_var.copy_(deviation**2)
    x = mean + deviation * torch.randn(6, 8)
    return Net(compute, scaler=scaler, hidden=linear(8, 32), head=linear(32, 4)), (x,)


@trap(NEVER, share=0.99)
def batch_norm_without_affine_after_conv() -> Built:
    """No weight and no bias to read the dtype from."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.second(F.relu(net.norm(net.first(x))))

    parts = {"first": conv(3, 8), "second": conv(8, 3)}
    return Net(compute, norm=nn.BatchNorm2d(8, affine=False), **parts), (torch.randn(2, 3, 8, 8),)


@trap(A16 | H16, share=0.99)
def rms_norm_of_small_values() -> Built:
    """Squares of 3e-4 vanish, and eps 1e-12 with them."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.up(x)
        return net.down(h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-12))

    parts = {"up": linear(16, 32, bias=False), "down": linear(32, 8)}
    return Net(compute, **parts), (torch.randn(4, 16) * 2e-4,)


@trap(A16 | H16, share=0.99)
def pixel_norm_of_dark_pixels() -> Built:
    """StyleGAN's pixel norm, eps 1e-8, on activations near 1e-4."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        h = h * torch.rsqrt(torch.mean(h * h, dim=1, keepdim=True) + 1e-8)
        return net.last(F.leaky_relu(h, 0.2))

    first = conv(3, 8)
    nn.init.zeros_(first.bias)
    return Net(compute, first=first, last=conv(8, 3)), (torch.randn(2, 3, 8, 8) * 1e-4,)


@trap(A16 | H16, share=0.99)
def normalize_rows_of_zeros() -> Built:
    """F.normalize's eps of 1e-12 is zero in FP16, and zero divided by zero is NaN."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(F.normalize(net.embed(x), dim=-1))

    x = torch.randn(6, 16)
    x[2] = 0.0
    return Net(compute, embed=linear(16, 32, bias=False), head=linear(32, 8)), (x,)


@trap(H16, share=0.99)
def normalize_near_zero_rows() -> Built:
    """Rows near 1e-6 have a direction in FP32."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(F.relu(net.embed(F.normalize(x, dim=-1))))

    x = torch.randn(6, 16) * torch.tensor([1.0, 1e-3, 1e-6, 1e-7, 1.0, 1e-8])[:, None]
    return Net(compute, embed=linear(16, 32), head=linear(32, 8)), (x,)


@trap(A16 | H16, share=0.99)
def cosine_similarity_of_large_vectors() -> Built:
    """The squared norms pass 65504."""

    def compute(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = net.embed(x), net.embed(y)
        return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1) + 1e-8).sqrt()

    x = torch.randn(16, 16)
    return Net(compute, embed=linear(16, 64, 2000.0)), (x, x + torch.randn(16, 16))


@trap(A16 | H16, share=0.99)
def global_response_norm_overflows() -> Built:
    """ConvNeXt V2's norm over all positions."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        size = h.norm(p=2, dim=(2, 3), keepdim=True)
        return net.last(h * (size / (size.mean(1, keepdim=True) + 1e-6)) / 4e3)

    return Net(compute, first=conv(3, 8, 5e3), last=conv(8, 3)), (torch.randn(1, 3, 24, 24),)


@trap(H16, share=0.99)
def weight_standardised_conv() -> Built:
    """BiT's convolution: the variance of small weights is zero in FP16."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(net.weight, (1, 2, 3), correction=0, keepdim=True)
        return net.last(F.conv2d(x, (net.weight - mean) / torch.sqrt(variance + 1e-10)) / 5.2)

    weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 1e-4)
    return Net(compute, weight=weight, last=conv(8, 3)), (torch.randn(2, 3, 8, 8),)


@trap(H16, share=0.99)
def stylegan_demodulation_overflows() -> Built:
    """Weights times styles, squared and summed over 144 places."""

    def compute(net: nn.Module, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        scale = net.affine(style)[:, None, :, None, None]
        weight = net.weight * scale
        weight = weight * torch.rsqrt((weight * weight).sum((2, 3, 4), keepdim=True) + 1e-8)
        out = F.conv2d(x.reshape(1, 32, 8, 8), weight.flatten(0, 1), padding=1, groups=2)
        return net.last(out.unflatten(1, (2, 8)).squeeze(0))

    weight = nn.Parameter(torch.randn(1, 8, 16, 3, 3))
    parts = {"affine": linear(12, 16, 60.0), "last": conv(8, 3)}
    return Net(compute, weight=weight, **parts), (torch.randn(2, 16, 8, 8), torch.randn(2, 12))


@trap(H16, share=0.99)
def raw_audio_standardised() -> Built:
    """Samples of 24 bits, standardised inside the model."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)
        return net.head(F.relu(net.first(x[:, None])).mean(-1))

    first = nn.Conv1d(1, 8, 16, stride=8)
    return Net(compute, first=first, head=linear(8, 4)), (torch.randn(3, 512) * 2e6 + 1e6,)
