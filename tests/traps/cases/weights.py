"""Weights, buffers and constants that FP16 cannot hold."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.traps.trap import A16, H16, NEVER, Built, Net, conv, linear, trap


@trap(A16 | H16, share=0.6)
def subnormal_weights_scaled_up() -> Built:
    """Weights of 2e-7, which FP16 holds with two bits, and a factor that brings them back."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.tanh(net.tiny(torch.relu(net.first(x))) * 1e6))

    tiny = linear(32, 16, 1e-6, bias=False)
    return Net(compute, first=linear(16, 32), tiny=tiny, head=linear(16, 16)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.6)
def weights_beyond_65504() -> Built:
    """Weights of 1e5 for inputs of 1e-5."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.relu(net.middle(torch.tanh(net.first(x)))))

    parts = {"first": linear(8, 16, 3e5), "middle": linear(16, 16), "last": linear(16, 16)}
    nn.init.normal_(parts["first"].bias, std=0.1)
    return Net(compute, **parts), (torch.randn(6, 8) * 3e-6,)


@trap(A16 | H16, share=0.99)
def scaled_down_and_up_again() -> Built:
    """A factor of 1e-8, then one of 1e8."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.relu(net.first(x) * 1e-8) * 1e8)

    return Net(compute, first=linear(16, 32), head=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.99)
def scale_parameter_of_1e8() -> Built:
    """The same with learned scalars, which broadcast as 0-dimensional parameters."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.relu(net.first(x) * net.small) * net.large)

    scalars = {"small": nn.Parameter(torch.tensor(1e-8)), "large": nn.Parameter(torch.tensor(1e8))}
    return Net(compute, first=linear(16, 32), head=linear(32, 4), **scalars), (torch.randn(6, 16),)


@trap(H16, share=0.99)
def buffer_of_a_million() -> Built:
    """Denormalisation: small outputs times a buffer of 1e6."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.relu(net.first(x))) * net.deviation + net.mean

    buffers = {"deviation": torch.full((4,), 1e6), "mean": torch.full((4,), 2e5)}
    return Net(compute, first=linear(16, 32), head=linear(32, 4), **buffers), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.6)
def vanishing_product_scaled_up() -> Built:
    """A linear layer whose weights fit and whose inputs fit, but whose outputs are 1e-8."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.relu(net.middle(net.first(x) * 1e7)))

    first = linear(16, 16, 2e-3, bias=False)
    parts = {"middle": linear(16, 32), "last": linear(32, 16)}
    return Net(compute, first=first, **parts), (torch.randn(6, 16) * 1e-4 * 0.5,)


@trap(A16 | H16, share=0.99)
def product_of_small_activations() -> Built:
    """A gate of 1e-4 times a value of 1e-4, normalised afterwards."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = net.pair(x).chunk(2, -1)
        h = a * b
        return net.head(h / (h.abs().amax(-1, keepdim=True) + 1e-12))

    return Net(compute, pair=linear(16, 64, bias=False), head=linear(32, 4)), (
        torch.randn(6, 16) * 1e-4,
    )


@trap(A16 | H16, share=0.5)
def int8_weights_with_tiny_scales() -> Built:
    """A dequantised layer: integers times a scale of 2e-9, undone by a LayerNorm."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = net.integers.to(x.dtype) * net.scales[:, None]
        h = F.linear(torch.relu(net.first(x)), weight)
        return net.last(F.layer_norm(h, (32,), eps=1e-20))

    integers = torch.randint(-127, 128, (32, 32), dtype=torch.int8)
    parts = {"first": linear(16, 32), "last": linear(32, 32)}
    return Net(compute, integers=integers, scales=torch.full((32,), 2e-9), **parts), (
        torch.randn(6, 16),
    )


@trap(NEVER, share=0.99)
def clip_logit_scale() -> Built:
    """A learned scalar, exp(4.6), times cosine similarities."""

    def compute(net: nn.Module, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        a, b = F.normalize(net.image(image), dim=-1), F.normalize(net.text(text), dim=-1)
        return net.logit_scale.exp() * a @ b.t()

    parts = {"image": linear(16, 32), "text": linear(8, 32)}
    scale = nn.Parameter(torch.tensor(4.6052))
    return Net(compute, logit_scale=scale, **parts), (torch.randn(5, 16), torch.randn(5, 8))


@trap(H16, share=0.99)
def weight_norm_of_large_directions() -> Built:
    """A direction of length 2e5, which its parametrization divides out."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.relu(net.first(x)))

    first = linear(16, 32)
    first = parametrizations.weight_norm(first)
    first.parametrizations.weight.original1.data *= 2e5
    return Net(compute, first=first, last=linear(32, 4)), (torch.randn(6, 16),)


@trap(H16, share=0.99)
def weight_norm_of_tiny_directions() -> Built:
    """A direction of 1e-8 per entry."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.relu(net.first(x)))

    first = parametrizations.weight_norm(conv(3, 8))
    first.parametrizations.weight.original1.data *= 1e-7
    return Net(compute, first=first, last=conv(8, 3)), (torch.randn(2, 3, 8, 8),)


@trap(H16, share=0.99)
def spectral_norm_of_large_weights() -> Built:
    """A largest singular value beyond 65504, which is divided out."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.relu(net.first(x)))

    first = parametrizations.spectral_norm(linear(16, 32, 1e5, bias=False))
    return Net(compute, first=first, last=linear(32, 4)), (torch.randn(6, 16),)


@trap(H16, share=0.99)
def looked_up_values_beyond_65504() -> Built:
    """A table of populations, whose logarithm is what is used."""

    def compute(net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return net.head(torch.relu(net.hidden(torch.log(net.table(ids)) - 13)))

    table = nn.Embedding(20, 8)
    table.weight.data = 10 ** (4 + 4 * torch.rand(20, 8))
    return Net(compute, table=table, hidden=linear(8, 32), head=linear(32, 4)), (
        torch.randint(20, (4, 6)),
    )


@trap(H16, share=0.99)
def layer_scale_of_1e7() -> Built:
    """A branch whose learned scale is tiny, alone on its path until a norm."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.gamma * net.first(x)
        return net.last(F.layer_norm(h, (32,), eps=1e-24))

    gamma = nn.Parameter(torch.rand(32) * 2e-8 + 1e-8)
    return Net(compute, first=linear(16, 32), last=linear(32, 4), gamma=gamma), (
        torch.randn(6, 16),
    )
