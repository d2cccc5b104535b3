"""Attention masks that do not fit FP16, and rows that are masked from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, NEVER, Built, Net, linear, trap

FP32_MIN = torch.finfo(torch.float32).min
Mask = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def attention(weigh: Mask, **buffers: torch.Tensor) -> Net:
    """Self-attention; `weigh` turns scores and a mask of real tokens into weights."""

    def compute(net: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return net.out(weigh(net, scores, keep[:, None, :]) @ v)

    return Net(compute, qkv=linear(16, 48), out=linear(16, 16), **buffers)


def padded(empty: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and which of them are real; the last sequence of a batch may be all padding."""
    lengths = torch.tensor([6, 4, 0 if empty else 2])
    return torch.randn(3, 6, 16), torch.arange(6) < lengths[:, None]


@trap(A16 | H16, share=0.99)
def mask_added_minus_1e9() -> Built:
    """BERT's additive mask."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return (scores + (1.0 - keep.to(scores.dtype)) * -1e9).softmax(-1)

    return attention(weigh), padded()


@trap(A16 | H16, share=0.99)
def mask_filled_minus_1e9() -> Built:
    """The annotated transformer's mask."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~keep, -1e9).softmax(-1)

    return attention(weigh), padded(empty=False)


@trap(A16 | H16, share=0.99)
def mask_where_minus_1e12() -> Built:
    """A constant chosen with `where`."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, scores, -1e12).softmax(-1)

    return attention(weigh), padded()


@trap(A16 | H16, share=0.99)
def mask_where_tensor_minus_1e12() -> Built:
    """As XLM has it: a tensor of the scores' own dtype."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, scores, torch.full_like(scores, -1e12)).softmax(-1)

    return attention(weigh), padded()


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def mask_added_finfo_min() -> Built:
    """The extended mask of transformers; rounded to BF16 it is minus infinity as well."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return (scores + (1.0 - keep.to(scores.dtype)) * FP32_MIN).softmax(-1)

    return attention(weigh), padded()


@trap(H16 | HB16, share=0.99)
def mask_buffer_finfo_min() -> Built:
    """A causal mask kept as a buffer; under left padding its first rows see nothing."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        bias = torch.where(keep, net.causal, net.causal.new_tensor(FP32_MIN))
        return (scores + bias).softmax(-1)

    causal = torch.full((6, 6), FP32_MIN).triu(1)
    x, keep = padded(empty=False)
    return attention(weigh, causal=causal), (x, keep.flip(1))


@trap(A16 | H16, share=0.99)
def mask_buffer_times_zero() -> Built:
    """GPT-2's `masked_bias`: as a low buffer it is infinite, and infinity times zero is NaN."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        seen = keep.to(scores.dtype)
        return (scores * seen + net.masked_bias * (1.0 - seen)).softmax(-1)

    return attention(weigh, masked_bias=torch.tensor(-1e9)), padded(empty=False)


@trap(A16 | H16, share=0.99)
def mask_assigned_in_place() -> Built:
    """Written into the scores at boolean indices."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[~keep.expand_as(scores)] = -1e9
        return scores.softmax(-1)

    return attention(weigh), padded()


@trap(NEVER, share=0.99)
def mask_minus_infinity() -> Built:
    """Every row sees something."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~keep, -math.inf).softmax(-1)

    return attention(weigh), padded(empty=False)


@trap(NEVER, share=0.99)
def mask_full_row_nan_to_num() -> Built:
    """The NaN of a row that sees nothing is the model's own, and mended by it."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0)

    return attention(weigh), padded()


@trap(A16 | H16 | AB16 | HB16, share=0.5)
def mask_sdpa_finfo_min() -> Built:
    """A float mask given to scaled_dot_product_attention."""

    def compute(net: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in net.qkv(x).chunk(3, -1))
        bias = (1.0 - keep[:, None, None, :].to(q.dtype)) * FP32_MIN
        h = F.scaled_dot_product_attention(q, k, v, bias.expand(3, 1, 6, 6))
        return net.out(h.transpose(1, 2).flatten(2))

    x, keep = padded()
    keep[1:] = False
    return Net(compute, qkv=linear(16, 48), out=linear(16, 16)), (x, keep)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def mask_log_of_tiny() -> Built:
    """AllenNLP's masked_softmax: the log of a mask plus 1e-45."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return (scores + (keep.to(scores.dtype) + 1e-45).log()).softmax(-1)

    return attention(weigh), padded()


@trap(A16 | H16, share=0.99)
def mask_renormalised_1e13() -> Built:
    """AllenNLP's other one: weights divided by their sum plus 1e-13."""

    def weigh(net: nn.Module, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        weights = scores.softmax(-1) * keep.to(scores.dtype)
        return weights / (weights.sum(-1, keepdim=True) + 1e-13)

    return attention(weigh), padded()


@trap(A16 | H16, share=0.99)
def masked_mean_of_empty_sentence() -> Built:
    """The mean pooling of sentence-transformers: zero divided by clamp(count, 1e-9)."""

    def compute(net: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        h = net.encode(x)
        seen = keep[..., None].to(h.dtype).expand_as(h)
        pooled = (h * seen).sum(1) / torch.clamp(seen.sum(1), min=1e-9)
        return net.head(pooled)

    return Net(compute, encode=linear(16, 32), head=linear(32, 8)), padded()
