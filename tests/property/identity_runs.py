"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

from tests.bits import same_bits
from tests.zoo import Example, mode


@dataclass(frozen=True)
class Run:
    """All that one forward and backward pass of a model leaves behind."""

    outputs: Any
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def run_on(call: nn.Module, built: Example, *, train: bool) -> Run:
    """Forward, then backward from random cotangents, from fixed random states."""
    original, args, kwargs = built
    wanted = {n: p for n, p in original.named_parameters() if p.requires_grad}
    with mode(original, call, train=train):
        result = call(*args, **kwargs)
        outputs = [t for t in pytree.tree_leaves(result) if getattr(t, "requires_grad", False)]
        cotangents = [torch.randn_like(t) for t in outputs]
        found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
        buffers = {n: b.clone() for n, b in original.named_buffers()}
    return Run(pytree.tree_map_only(torch.Tensor, torch.detach, result), gradients, buffers)


def in_fp32(tree: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, tree
    )


def equal(want: Any, have: Any) -> bool:
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
    return all(same_bits(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


class Gru(nn.Module):
    """Two layers in both directions, from a state that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.gru = nn.GRU(16, 24, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.head = nn.Linear(48, 50)

    def forward(self, ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(ids), state)[0])


def padded_left() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randint(3, 99, (2, 10)), mask


def decoder(family: str) -> Example:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_cache=False,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config), padded_left(), {}


def wav2vec2() -> Example:
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    )
    return transformers.Wav2Vec2ForCTC(config), (torch.randn(2, 800),), {}


def seq2seq() -> Example:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    return model, (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), {}


def gru() -> Example:
    return Gru(), (torch.randint(0, 50, (2, 10)), torch.randn(4, 2, 24)), {}


FURTHER: dict[str, Callable[[], Example]] = {
    "qwen3": lambda: decoder("Qwen3"),
    "gemma2": lambda: decoder("Gemma2"),
    "wav2vec2": wav2vec2,
    "transformer": seq2seq,
    "gru": gru,
}
