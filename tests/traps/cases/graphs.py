"""What the model's own code asks for: casts, custom ops, control flow, outputs of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests.traps.trap import A16, AB16, H16, HB16, NEVER, Built, Net, linear, trap


@torch.library.custom_op("amp_traps::float_only", mutates_args=())
def float_only(x: torch.Tensor) -> torch.Tensor:
    """A kernel written for FP32 alone, as a CUDA extension may be."""
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected scalar type Float but found {x.dtype}")
    return x * torch.sigmoid(1.5 * x)


@float_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def custom_op_with_an_fp32_kernel() -> Built:
    """It lies between two linear layers and refuses every other dtype."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(float_only(net.first(x)))

    return Net(compute, first=linear(16, 32), last=linear(32, 4)), (torch.randn(6, 16),)


@trap(NEVER, share=0.99)
def explicit_float_around_squares() -> Built:
    """The model's author upcasts; the cast must not be folded away."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return net.last(wide.type_as(h))

    return Net(compute, first=linear(16, 32, 500.0), last=linear(32, 4)), (torch.randn(6, 16),)


@trap(H16 | HB16, share=0.4)
def explicit_half_that_saturates() -> Built:
    """A cast pair that overflows on purpose; folding it away would change the answer."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x).to(torch.float16).to(torch.float32)
        return net.last(torch.nan_to_num(h, posinf=1e4, neginf=-1e4) / 1e4)

    return Net(compute, first=linear(16, 32, 4e4), last=linear(32, 16)), (torch.randn(6, 16),)


@trap(NEVER, share=0.99)
def double_precision_part() -> Built:
    """A sum that the author wants in FP64."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        total = (h.double() ** 2).sum(-1, keepdim=True) * 1e6
        return net.last(h * torch.log(total).to(h.dtype) / 20)

    return Net(compute, first=linear(16, 32), last=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.9)
def branch_on_a_value() -> Built:
    """torch.cond; both branches square values of a few hundred."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        h = torch.cond(
            x.sum() > 0,
            lambda t: t / torch.sqrt(t.pow(2).mean(-1, keepdim=True)),
            lambda t: t / torch.sqrt(t.pow(2).sum(-1, keepdim=True)),
            (h,),
        )
        return net.last(h)

    return Net(compute, first=linear(16, 32, 400.0), last=linear(32, 4)), (
        torch.randn(6, 16).abs(),
    )


@trap(A16 | H16, share=0.9)
def checkpointed_block() -> Built:
    """A region that is computed again in the backward pass."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h: Any = checkpoint(net.block, net.first(x), use_reentrant=False)
        return net.last(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    block = nn.Sequential(linear(16, 32), nn.GELU(), linear(32, 16, 700.0))
    return Net(compute, first=linear(16, 16), block=block, last=linear(16, 4)), (
        torch.randn(6, 16),
    )


class Symmetric(nn.Module):
    """A parametrization: a symmetric matrix from its upper triangle."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.triu() + weight.triu(1).transpose(-1, -2)) * 1e6


@trap(H16, share=0.99)
def symmetric_parametrization_of_tiny_values() -> Built:
    """The stored weight is subnormal in FP16, the one that is used is not."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.tanh(net.first(x)))

    first = linear(16, 16, 1e-6)
    nn.init.zeros_(first.bias)
    parametrize.register_parametrization(first, "weight", Symmetric())
    return Net(compute, first=first, last=linear(16, 4)), (torch.randn(6, 16),)


@trap(H16 | HB16, share=0.5)
def orthogonal_parametrization() -> Built:
    """A matrix exponential or a solve, for which there are no low kernels."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.last(torch.tanh(net.first(x)))

    first = parametrizations.orthogonal(nn.Linear(16, 16), orthogonal_map="cayley")
    return Net(compute, first=first, last=linear(16, 4)), (torch.randn(6, 16),)


@trap(H16, share=0.99)
def tied_embedding_and_head() -> Built:
    """One weight that is looked up and multiplied with."""

    def compute(net: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        h = net.embed(ids)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.linear(torch.tanh(net.hidden(h)), net.embed.weight)

    embed = nn.Embedding(50, 16)
    nn.init.normal_(embed.weight, std=400.0)
    return Net(compute, embed=embed, hidden=linear(16, 16)), (torch.randint(50, (4, 6)),)


@trap(A16 | H16, share=0.99)
def outputs_of_every_kind() -> Built:
    """A dict of tuples, None, integers, booleans and tensors; one of them overflows."""

    def compute(net: nn.Module, x: torch.Tensor) -> dict[str, Any]:
        h = net.first(x)
        return {
            "pair": (net.last(torch.tanh(h)), h.pow(2)),
            "none": None,
            "size": h.shape[-1],
            "best": x.argmax(-1),
            "seen": x > 0,
            "double": x.double().sum(),
            "flag": True,
        }

    return Net(compute, first=linear(16, 32, 300.0), last=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.99)
def empty_tensors() -> Built:
    """No boxes were found: layers run on nothing, and sums of nothing are zero."""

    def compute(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = net.first(x)
        none = net.last(h[:, :0])
        total = (h[:, :0].exp().sum(1, keepdim=True) + 1e-8) * 1e8
        return none, net.last(torch.cat([h[:, :0], h], 1) * total)

    return Net(compute, first=linear(16, 32), last=linear(32, 4)), (torch.randn(2, 5, 16),)


@trap(A16 | H16, share=0.99)
def scalar_parameters() -> Built:
    """Learned scalars of no dimension, one of which is 1e-7 and stands in a denominator."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(net.first(x))
        return net.last(net.gain * h / (h.sum(-1, keepdim=True) + net.eps))

    x = torch.randn(6, 16)
    x[2] = 0.0
    scalars = {"gain": nn.Parameter(torch.tensor(8.0)), "eps": nn.Parameter(torch.tensor(1e-8))}
    return Net(compute, first=linear(16, 32, bias=False), last=linear(32, 4), **scalars), (x,)


@trap(NEVER, share=0.99)
def reparametrised_sample() -> Built:
    """A VAE's sample: FP16 draws other numbers from the same random stream."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mean, log_variance = net.encode(x).chunk(2, -1)
        deviation = torch.exp(0.5 * log_variance)
        return net.decode(mean + deviation * torch.randn_like(deviation))

    return Net(compute, encode=linear(16, 32), decode=linear(16, 8)), (torch.randn(6, 16),)


@trap(AB16 | HB16, share=0.99)
def random_tokens_are_dropped() -> Built:
    """Uniform noise decides, in eval mode as well, which tokens a masked autoencoder keeps."""

    def compute(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = net.embed(x)
        order = torch.rand_like(h[..., 0]).argsort(1)
        keep = order[:, :8]
        kept = h.gather(1, keep[..., None].expand(-1, -1, h.shape[-1]))
        return net.head(kept), keep

    return Net(compute, embed=linear(8, 16), head=linear(16, 4)), (torch.randn(1, 1024, 8),)


@trap(H16 | HB16, share=0.99)
def routing_to_the_best_experts() -> Built:
    """The top two of a router whose logits lie close together, fed from FP32 features."""

    def compute(net: nn.Module, x: torch.Tensor, logits: torch.Tensor) -> Any:
        weight, chosen = (logits + 100).topk(2, -1)
        weight = weight.softmax(-1)
        outputs = torch.stack([expert(x) for expert in net.experts], 1)
        picked = outputs.gather(1, chosen[..., None].expand(-1, -1, 8))
        return (picked * weight[..., None]).sum(1), chosen

    experts = nn.ModuleList(linear(16, 8) for _ in range(4))
    logits = torch.stack([torch.randperm(4) for _ in range(40)]) * 0.02
    return Net(compute, experts=experts), (torch.randn(40, 16), logits)


@trap(H16 | HB16, share=0.99)
def order_of_close_scores() -> Built:
    """sort and argmax of scores that differ by 1e-4."""

    def compute(net: nn.Module, x: torch.Tensor, score: torch.Tensor) -> Any:
        order = score.argsort(-1, descending=True)
        h = net.embed(x).gather(1, order[..., None].expand(-1, -1, 16))
        return net.head(h[:, :4]), order, score.argmax(-1)

    score = 5 + torch.stack([torch.randperm(32) for _ in range(3)]) * 1e-4
    return Net(compute, embed=linear(8, 16), head=linear(16, 4)), (torch.randn(3, 32, 8), score)
