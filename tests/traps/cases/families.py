"""Tiny models of real families from transformers, with the values that large ones reach."""

from __future__ import annotations

import torch
from torch import nn

from tests.traps.trap import A16, H16, Built, Net, trap

IDS = torch.tensor([[5, 17, 42, 8, 3, 99, 7, 1], [9, 4, 77, 23, 11, 0, 0, 0]])
KEEP = (torch.arange(8) < torch.tensor([8, 5])[:, None]).long()


def logits(net: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits of a transformers model."""
    return net.model(**inputs, return_dict=True).logits


@trap(A16 | H16, share=0.7)
def t5_with_large_activations() -> Built:
    """Flan-T5's feed-forward block passes 65504 in its encoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    block = model.encoder.block[0].layer[1].DenseReluDense
    for part in (block.wi_0, block.wi_1, block.wo):
        nn.init.normal_(part.weight, std=8.0)

    def compute(net: nn.Module, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return logits(net, input_ids=ids, attention_mask=keep, decoder_input_ids=ids.flip(1))

    return Net(compute, model=model), (IDS, KEEP)


@trap(A16 | H16, share=0.8)
def llama_with_massive_activations() -> Built:
    """A feed-forward block brings the residual stream beyond 65504; the norms upcast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mlp = model.model.layers[0].mlp
    for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        nn.init.normal_(part.weight, std=12.0)

    def compute(net: nn.Module, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return logits(net, input_ids=ids, attention_mask=keep)

    return Net(compute, model=model), (IDS, KEEP)


@trap(A16 | H16, share=0.7)
def bloom_with_large_products() -> Built:
    """ALiBi from the running sum of a mask, and a last product beyond 65504."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
    model = BloomForCausalLM(config)
    mlp = model.transformer.h[1].mlp
    nn.init.normal_(mlp.dense_h_to_4h.weight, std=40.0)
    nn.init.normal_(mlp.dense_4h_to_h.weight, std=80.0)

    def compute(net: nn.Module, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return logits(net, input_ids=ids, attention_mask=keep)

    return Net(compute, model=model), (IDS, KEEP)


@trap(A16 | H16, share=0.8)
def opt_with_large_products() -> Built:
    """OPT's second feed-forward product passes 65504 before the final LayerNorm."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    block = model.model.decoder.layers[1]
    nn.init.normal_(block.fc1.weight, std=40.0)
    nn.init.normal_(block.fc2.weight, std=200.0)

    def compute(net: nn.Module, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return logits(net, input_ids=ids, attention_mask=keep)

    return Net(compute, model=model), (IDS, KEEP)


@trap(A16 | H16, share=0.5)
def mamba_with_large_gates() -> Built:
    """The scan's result times its gate passes 65504; the last projection brings it back."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=1, use_cache=False
    )
    model = MambaForCausalLM(config)
    mixer = model.backbone.layers[0].mixer
    nn.init.normal_(mixer.in_proj.weight, std=150.0)
    nn.init.normal_(mixer.x_proj.weight, std=1e-3)
    nn.init.normal_(mixer.out_proj.weight, std=1e-3)

    def compute(net: nn.Module, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return logits(net, input_ids=ids, attention_mask=keep)

    return Net(compute, model=model), (IDS, KEEP)
