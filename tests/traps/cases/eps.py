"""An eps that is zero in FP16, in a denominator, under a root or inside a logarithm."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, H16, HB16, Built, Net, linear, trap


@trap(A16 | H16, share=0.99)
def divided_by_a_sum_plus_1e8() -> Built:
    """ReLU attention: a query that no key answers divides zero by 1e-8."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        weight = F.relu(q @ k.transpose(-2, -1))
        return net.out((weight / (weight.sum(-1, keepdim=True) + 1e-8)) @ v)

    x = torch.randn(2, 6, 16)
    x[0, 2] = 0.0
    return Net(compute, qkv=linear(16, 48, bias=False), out=linear(16, 8)), (x,)


@trap(A16 | H16, share=0.99)
def divided_by_clamp_min_1e8() -> Built:
    """Shares of a count that may be zero."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        amount = F.relu(net.amount(x))
        share = amount / amount.sum(-1, keepdim=True).clamp_min(1e-8)
        return net.head(share * 4)

    x = torch.randn(6, 16)
    x[3] = 0.0
    return Net(compute, amount=linear(16, 8, bias=False), head=linear(8, 4)), (x,)


@trap(A16 | H16, share=0.99)
def rsqrt_of_a_zero_variance() -> Built:
    """A constant feature: rsqrt(0 + 1e-8) times zero."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        mean = h.mean(-1, keepdim=True)
        scale = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + 1e-8)
        return net.head((h - mean) * scale)

    x = torch.randn(6, 16)
    x[1] = 0.0
    return Net(compute, embed=linear(16, 32, bias=False), head=linear(32, 4)), (x,)


@trap(A16 | H16 | HB16, share=0.9)
def log_mel_front_end() -> Built:
    """The STFT of 16-bit samples, a mel matrix and log(x + 1e-10), with silence in it."""

    def compute(net: nn.Module, wave: torch.Tensor) -> torch.Tensor:
        frames = torch.stft(wave / 32768, 64, 32, window=net.window, return_complex=True)
        power = frames.abs() ** 2
        log = torch.log(net.mel @ power + 1e-10)
        return net.head(net.hidden((log.transpose(1, 2) + 8) / 6))

    wave = torch.randn(2, 640) * 3000
    wave[:, 320:] = 0.0
    mel = torch.rand(16, 33) / 33
    parts = {"hidden": linear(16, 256), "head": linear(256, 64)}
    return Net(compute, window=torch.hann_window(64), mel=mel, **parts), (wave,)


@trap(A16 | H16, share=0.99)
def log_of_zero_plus_1e10() -> Built:
    """Log intensities of an encoder whose units may be off."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.log(F.relu(net.up(x)) + 1e-10) / 10)

    return Net(compute, up=linear(16, 32), head=linear(32, 4)), (torch.randn(6, 16),)


@trap(H16, share=0.99)
def dice_of_an_empty_class() -> Built:
    """A class with no pixels: zero over 1e-8, and 1 minus that."""

    def compute(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        p = F.relu(net.segment(x)) * net.present
        target = target.to(p.dtype)
        both, each = (p * target).sum((0, 2, 3)), (p + target).sum((0, 2, 3))
        return 1 - 2 * both / (each + 1e-8)

    segment = nn.Conv2d(3, 4, 1)
    target = F.one_hot(torch.randint(3, (2, 8, 8)), 4).permute(0, 3, 1, 2)
    present = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    return Net(compute, segment=segment, present=present), (torch.randn(2, 3, 8, 8), target)


@trap(H16, share=0.99)
def overlap_of_boxes_in_pixels() -> Built:
    """Areas of a million pixels, and an empty box over 1e-7."""

    def compute(net: nn.Module, x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        corner, size = net.regress(x).chunk(2, -1)
        size = F.relu(size) * (x.abs().amax(-1, keepdim=True) > 0)
        left = torch.maximum(corner, truth[:, :2])
        right = torch.minimum(corner + size, truth[:, 2:])
        both = (right - left).clamp(min=0).prod(-1)
        area = size.prod(-1) + (truth[:, 2:] - truth[:, :2]).prod(-1) - both
        return both / (area + 1e-7)

    regress = linear(8, 4, 50.0)
    regress.bias.data = torch.tensor([200.0, 200.0, 900.0, 900.0])
    x = torch.randn(6, 8)
    truth = torch.tensor([[100.0, 100.0, 1000.0, 1000.0]]).repeat(6, 1)
    x[4], truth[4] = 0.0, 300.0
    return Net(compute, regress=regress), (x, truth)


@trap(H16, share=0.9)
def directions_between_atoms() -> Built:
    """An equivariant layer: each atom's distance to itself is the root of 1e-12."""

    def compute(net: nn.Module, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        apart = place[:, None] - place[None]
        far = torch.sqrt((apart**2).sum(-1, keepdim=True) + 1e-12)
        weight = torch.tanh(h @ h.t() / 4)[..., None]
        return net.out(((apart / far) * weight).sum(1))

    return Net(compute, embed=linear(8, 16), out=linear(3, 4)), (
        torch.randn(7, 8),
        torch.randn(7, 3),
    )


@trap(H16, share=0.99)
def inverse_frequency_weights() -> Built:
    """Weights 1 / (count + 1e-6) of small shares, normalised to one."""

    def compute(net: nn.Module, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        weight = 1 / (share + 1e-6)
        weight = weight / weight.sum()
        return net.head(F.relu(net.hidden(x))) * weight * 8

    share = torch.tensor([0.6, 0.39, 1e-5, 5e-6, 2e-6, 1e-6, 3e-5, 8e-6])
    return Net(compute, hidden=linear(16, 32), head=linear(32, 8)), (torch.randn(6, 16), share)


@trap(H16, share=0.99)
def adaptive_step_of_an_unrolled_optimiser() -> Built:
    """A learned optimiser's Adam step: g / (sqrt(v) + 1e-8) for gradients of 1e-6."""

    def compute(net: nn.Module, grad: torch.Tensor) -> torch.Tensor:
        second = (grad * grad).mean(0, keepdim=True)
        step = grad / (torch.sqrt(second) + 1e-8)
        return net.head(torch.tanh(net.hidden(step)))

    return Net(compute, hidden=linear(16, 32), head=linear(32, 4)), (torch.randn(6, 16) * 1e-6,)
