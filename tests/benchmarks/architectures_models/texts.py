"""Language models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.benchmarks.architectures_models.architecture import (
    VOCABULARY,
    Architecture,
    Inputs,
    ids,
    text,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SIZES, "intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}


def of(model: Any, config: Any, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds a model of a configuration."""

    def build() -> nn.Module:
        built: nn.Module = model(config(**settings))
        return built

    return build


def both(batch: int, length: int) -> Inputs:
    """For an encoder and a decoder."""
    return {**text(batch, length), "decoder_input_ids": ids(batch, length)}


def speech(batch: int, length: int) -> Inputs:
    return torch.randn(batch, 40 * length)


def spectrum(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 80, 60), "decoder_input_ids": ids(batch, length)}


def clip(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "pixel_values": torch.rand(batch, 3, 30, 30)}


VISION = {**SIZES, "intermediate_size": 64, "image_size": 30, "patch_size": 6}
WAV2VEC2 = {
    **SIZES, "intermediate_size": 64, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "vocab_size": VOCABULARY, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = {
    **BART, "d_model": 16, "num_mel_bins": 80, "max_source_positions": 30,
    "max_target_positions": 20, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTIL = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4,
    "use_cache": False,
}  # fmt: skip
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}

_SOURCE = "transformers"
ARCHITECTURES = tuple(
    Architecture(name, _SOURCE, build, call)
    for name, build, call in (
        ("BERT", of(hf.BertModel, hf.BertConfig, **TEXT), text),
        ("RoBERTa", of(hf.RobertaModel, hf.RobertaConfig, **TEXT), text),
        ("DistilBERT", of(hf.DistilBertModel, hf.DistilBertConfig, **DISTIL), text),
        ("DeBERTa v2", of(hf.DebertaV2Model, hf.DebertaV2Config, **TEXT), text),
        ("GPT-2", of(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2), text),
        ("Llama", of(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED), text),
        ("Qwen3", of(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED, head_dim=8), text),
        ("Gemma 2", of(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GEMMA), text),
        (
            "Mixtral",
            of(hf.MixtralForCausalLM, hf.MixtralConfig, **GROUPED, num_local_experts=4),
            text,
        ),
        ("Mamba", of(hf.MambaForCausalLM, hf.MambaConfig, **MAMBA), text),
        ("T5", of(hf.T5ForConditionalGeneration, hf.T5Config, **T5), both),
        ("BART", of(hf.BartForConditionalGeneration, hf.BartConfig, **BART), both),
        ("Whisper", of(hf.WhisperForConditionalGeneration, hf.WhisperConfig, **WHISPER), spectrum),
        ("wav2vec2", of(hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config, **WAV2VEC2), speech),
        ("CLIP", of(hf.CLIPModel, hf.CLIPConfig, text_config=TEXT, vision_config=VISION), clip),
    )
)
