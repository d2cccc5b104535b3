"""Products and powers that pass 65504: matrix products, feed-forward blocks, residual streams."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, H16, Built, Net, conv, linear, trap


def rms_norm(h: torch.Tensor) -> torch.Tensor:
    """T5's norm, with its upcast."""
    return (h * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(h)


@trap(A16 | H16, share=0.65)
def t5_feed_forward_overflows() -> Built:
    """The gated block's second product passes 65504, and the residual sum after it."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = rms_norm(x)
        x = x + net.wo(F.gelu(net.wi_0(h), approximate="tanh") * net.wi_1(h))
        return net.head(rms_norm(x))

    parts = {"wi_0": linear(16, 64, 40.0, bias=False), "wi_1": linear(16, 64, 40.0, bias=False)}
    parts |= {"wo": linear(64, 16, 60.0, bias=False), "head": linear(16, 16)}
    return Net(compute, **parts), (torch.randn(2, 5, 16),)


@trap(A16 | H16, share=0.6)
def gated_product_overflows() -> Built:
    """SwiGLU: each factor fits, their product does not."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.down(F.silu(net.gate(x)) * net.up(x))

    parts = {"gate": linear(16, 64, 400.0), "up": linear(16, 64, 400.0)}
    return Net(compute, down=linear(64, 16, 1.0), **parts), (torch.randn(2, 5, 16),)


@trap(A16 | H16, share=0.8)
def attention_scores_before_scaling() -> Built:
    """q·k passes 65504 before it is divided."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1) / 4e4).softmax(-1)
        return net.out(weights @ v) / 100

    return Net(compute, qkv=linear(16, 192, 100.0), out=linear(64, 16)), (torch.randn(2, 6, 16),)


@trap(A16 | H16)
def long_product_overflows() -> Built:
    """A linear layer over 8192 counts, divided by their number only afterwards."""

    def compute(net: nn.Module, counts: torch.Tensor) -> torch.Tensor:
        return net.head(torch.tanh(net.table(counts) / 8192 - 15))

    table = nn.Linear(8192, 16, bias=False)
    nn.init.uniform_(table.weight, 3.0, 5.0)
    return Net(compute, table=table, head=linear(16, 4)), (torch.rand(4, 8192) * 8,)


@trap(A16 | H16, share=0.2)
def wide_conv_overflows() -> Built:
    """256 channels times nine places of positive values; BatchNorm follows."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(net.first(x))
        return net.last(F.relu(net.norm(net.wide(h))))

    wide = nn.Conv2d(256, 8, 3, padding=1, bias=False)
    nn.init.uniform_(wide.weight, 0.0, 30.0)
    norm, first, x = nn.BatchNorm2d(8), conv(3, 256, 10.0), torch.randn(1, 3, 8, 8)
    seen = wide(F.relu(first(x))).detach()
    norm.running_mean.copy_(seen.mean((0, 2, 3)))
    norm.running_var.copy_(seen.var((0, 2, 3)))
    return Net(compute, first=first, wide=wide, norm=norm, last=conv(8, 3)), (x,)


@trap(H16, share=0.99)
def massive_activations_in_the_residual_stream() -> Built:
    """Each block adds 2.5e4 to one channel; only the running sum passes 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(net.ups, net.downs, strict=True):
            x = x + down(F.relu(up(rms_norm(x) * net.gain)))
        return net.head(rms_norm(x) * net.gain)

    downs = [linear(32, 16) for _ in range(4)]
    for down in downs:
        nn.init.zeros_(down.weight[0])
        down.bias.data[0] = 2.5e4
    gain = nn.Parameter(torch.full((16,), 4e3))
    gain.data[0] = 0.1
    ups = nn.ModuleList(linear(16, 32) for _ in range(4))
    parts = {"ups": ups, "downs": nn.ModuleList(downs), "head": linear(16, 8), "gain": gain}
    x = torch.randn(2, 5, 16)
    x[..., 0] = 2.5e4
    return Net(compute, **parts), (x,)


@trap(A16 | H16, share=0.5)
def squared_relu_overflows() -> Built:
    """Primer's activation on values of a few hundred."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.tanh(net.down(torch.square(F.relu(net.up(x))))))

    parts = {"up": linear(16, 32, 200.0), "down": linear(32, 16, 2e-5 * 16), "head": linear(16, 8)}
    return Net(compute, **parts), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.99)
def cubes_overflow() -> Built:
    """A polynomial feature, scaled back at once."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.down(net.up(x) ** 3 / 1e5)

    return Net(compute, up=linear(16, 32, 60.0), down=linear(32, 8)), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.99)
def gradient_magnitude_overflows() -> Built:
    """sqrt(x² + y²) of two convolutions."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        dx, dy = net.edges(x).chunk(2, 1)
        return net.last(torch.sqrt(dx**2 + dy**2 + 1e-6) / 300)

    return Net(compute, edges=conv(1, 16, 300.0), last=conv(8, 3)), (torch.randn(2, 1, 8, 8),)


@trap(A16 | H16, share=0.7)
def gram_matrix_overflows() -> Built:
    """The Gram matrix of a style loss, divided by the number of places only afterwards."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(net.first(x)).flatten(2)
        gram = h @ h.transpose(1, 2) / h.shape[-1]
        return net.head(gram.flatten(1) / 20)

    return Net(compute, first=conv(3, 8, 15.0), head=linear(64, 4)), (torch.randn(2, 3, 32, 32),)


@trap(A16 | H16, share=0.7)
def bilinear_pooling_overflows() -> Built:
    """Outer products summed over all places, then a signed root and a normalisation."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x).flatten(2)
        pooled = torch.einsum("bip,bjp->bij", h, h).flatten(1)
        rooted = pooled.sign() * torch.sqrt(pooled.abs() + 1e-8)
        return net.head(F.normalize(rooted))

    return Net(compute, first=conv(3, 8, 30.0), head=linear(64, 4)), (torch.randn(2, 3, 16, 16),)


@trap(H16, share=0.99)
def prod_overflows() -> Built:
    """The product of eight factors, then its logarithm."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        factors = net.factors(x).abs() + 4
        return net.head(torch.log(factors.prod(-1, keepdim=True)) / 10 + factors / 20)

    return Net(compute, factors=linear(16, 8, 2.0), head=linear(8, 4)), (torch.randn(4, 16),)


@trap(A16 | H16, share=0.5)
def tied_autoencoder_overflows_once() -> Built:
    """One weight in two products, of which only the second passes 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        code = torch.relu(F.linear(x, net.weight))
        out = F.linear(code, net.weight.t())
        return net.head(out / 1e5)

    weight = nn.Parameter(torch.randn(64, 16) * 60)
    return Net(compute, weight=weight, head=linear(16, 8)), (torch.randn(4, 16),)
