"""Ops between two products, which painting draws into the low-precision region around them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, Built, Net, conv, linear, trap


@trap(A16 | H16, share=0.99)
def divided_by_its_size_plus_1e8() -> Built:
    """A soft sign: where a row is zero, zero is divided by the eps alone."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        return net.last(h / (h.abs() + 1e-8))

    x = torch.randn(6, 16)
    x[1] = 0.0
    return Net(compute, first=linear(16, 32, bias=False), last=linear(32, 4)), (x,)


@trap(A16 | H16, share=0.99)
def divided_by_a_root_plus_1e10() -> Built:
    """h / sqrt(h·h + 1e-10), without a sum that would keep it in FP32."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        return net.last(h / torch.sqrt(h * h + 1e-10))

    x = torch.randn(6, 16)
    x[1] = 0.0
    return Net(compute, first=linear(16, 32, bias=False), last=linear(32, 4)), (x,)


@trap(A16 | H16, share=0.99)
def divided_by_the_largest_clamped_at_1e8() -> Built:
    """Scaling a row to its largest entry, which may be zero."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(net.first(x))
        return net.last(h / h.amax(-1, keepdim=True).clamp_min(1e-8))

    x = torch.randn(6, 16)
    x[1] = 0.0
    return Net(compute, first=linear(16, 32, bias=False), last=linear(32, 4)), (x,)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def complement_of_a_saturated_gate() -> Built:
    """1 - sigmoid(9), scaled back up."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last((1 - torch.sigmoid(net.gate(x))) * 8000)

    gate = linear(16, 32)
    nn.init.constant_(gate.bias, 9.0)
    return Net(compute, gate=gate, last=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def slope_of_a_saturated_tanh() -> Built:
    """1 - tanh(5)², the factor of a backward pass written by hand."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        t = torch.tanh(net.first(x))
        return net.last((1 - t * t) * 2000)

    first = linear(16, 32, 0.5)
    nn.init.constant_(first.bias, 5.0)
    return Net(compute, first=first, last=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.99)
def faint_probabilities_scaled_up() -> Built:
    """Beside a dominant class all others have 4e-8; their ratios are what is used."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        p = net.score(x).softmax(-1)
        return net.last(p[:, 1:] * 1e7)

    score = linear(16, 33, 0.7)
    nn.init.zeros_(score.bias)
    nn.init.zeros_(score.weight[0])
    score.bias.data[0] = 17.0
    return Net(compute, score=score, last=linear(32, 4)), (torch.randn(6, 16),)


@trap(H16 | HB16, share=0.99)
def boxes_relative_to_an_origin() -> Built:
    """Offsets added to pixel 4000 and taken relative to it again, for a second stage."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        centre = net.propose(x) + net.anchors
        return net.refine((centre - net.origin) / 2)

    anchors = torch.rand(12, 4) * 3 + 4000
    parts = {"propose": linear(16, 4), "refine": linear(4, 16)}
    return Net(compute, anchors=anchors, origin=torch.tensor(4001.5), **parts), (
        torch.randn(12, 16),
    )


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def local_variance_by_average_pooling() -> Built:
    """SSIM and guided filters: the pooled square less the square of what is pooled."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        mean = F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)
        square = F.avg_pool2d(h * h, 3, 1, 1, count_include_pad=False)
        return net.last((h - mean) / torch.sqrt((square - mean * mean).clamp_min(0) + 1e-2))

    first = conv(3, 8)
    nn.init.constant_(first.bias, 30.0)
    return Net(compute, first=first, last=conv(8, 3)), (torch.randn(2, 3, 8, 8),)


@trap(A16 | H16 | AB16 | HB16, share=0.8)
def batch_norm_takes_off_a_large_mean() -> Built:
    """A convolution's outputs are 1000 ± 1, and only the ± 1 is left."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(F.relu(net.norm(net.middle(F.relu(net.first(x))))))

    middle, norm = conv(8, 8, size=1), nn.BatchNorm2d(8)
    nn.init.constant_(middle.bias, 1000.0)
    norm.running_mean.fill_(1000.0)
    return Net(compute, first=conv(3, 8), middle=middle, norm=norm, last=conv(8, 3)), (
        torch.randn(2, 3, 8, 8),
    )


@trap(A16 | H16 | AB16 | HB16, share=0.7)
def layer_norm_takes_off_a_large_offset() -> Built:
    """A bias of 2000 in all channels alike, which LayerNorm removes."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(F.gelu(net.middle(net.norm(net.first(x)))))

    first = linear(16, 32)
    nn.init.constant_(first.bias, 2000.0)
    parts = {"middle": linear(32, 32), "last": linear(32, 16)}
    return Net(compute, first=first, norm=nn.LayerNorm(32), **parts), (torch.randn(6, 16),)


@trap(A16 | H16 | AB16 | HB16, share=0.7)
def linear_layer_on_features_with_an_offset() -> Built:
    """Readings of 3000 ± 10: the cast of the input loses them, before BatchNorm centres."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(net.norm(net.first(x)))
        return net.last(F.relu(net.middle(h)))

    first, norm = linear(16, 16), nn.BatchNorm1d(16)
    x = 3000 + torch.randn(64, 16) * 10
    seen = first(x).detach()
    norm.running_mean.copy_(seen.mean(0))
    norm.running_var.copy_(seen.var(0))
    parts = {"middle": linear(16, 32), "last": linear(32, 16)}
    return Net(compute, first=first, norm=norm, **parts), (x,)


@trap(A16 | H16 | AB16 | HB16)
def recurrent_layer_that_adds() -> Built:
    """An identity RNN adds 0.06 to 200 in each of 100 steps, inside one kernel."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        state = net.rnn(x, net.start)[1][0]
        return net.head(torch.tanh((state - 200) / 5))

    rnn = nn.RNN(4, 8, nonlinearity="relu", batch_first=True)
    nn.init.eye_(rnn.weight_hh_l0)
    nn.init.constant_(rnn.weight_ih_l0, 0.25)
    nn.init.zeros_(rnn.bias_hh_l0)
    rnn.bias_ih_l0.data = torch.linspace(0.0, 0.005, 8)
    x = 0.05 + torch.rand(2, 100, 4) * 0.01
    return Net(compute, rnn=rnn, head=linear(8, 4), start=torch.full((1, 2, 8), 200.0)), (x,)


@trap(A16 | H16 | AB16 | HB16, share=0.6)
def positions_from_a_triangular_product() -> Built:
    """A running sum as a matrix product, and the sines of what it counts."""

    def compute(net: nn.Module, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        place = net.triangle @ length[..., None] * net.frequency
        return net.head(net.embed(x) + torch.cat([place.sin(), place.cos()], -1))

    parts = {"embed": linear(4, 16), "head": linear(16, 4)}
    buffers = {"triangle": torch.ones(64, 64).tril(), "frequency": torch.logspace(0, -2, 8)}
    lengths = torch.randint(40, 90, (2, 64)).float()
    return Net(compute, **parts, **buffers), (torch.randn(2, 64, 4), lengths)
