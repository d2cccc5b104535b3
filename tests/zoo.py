"""Tiny models of every kind that the tool claims to convert, and what the tests share of them.

`build(name)` makes a fresh model with example inputs. The other functions are cached: a process
captures each model once, however many tests look at it. Such a model belongs to all tests: a test
that needs another training mode or that moves buffers says so with `mode`, which puts both back,
and one that changes weights builds its own.

The attention masks hold real padding. With an all-ones mask, or none, transformers takes another
path while it is traced than in eager mode (eager drops the mask for `is_causal`), and Llama's
gradients then differ by 1e-7: a property of transformers, which the fidelity check would report.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model and the (args, kwargs) of one call."""

DTYPES = (torch.float16, torch.bfloat16)


class ConvNet(nn.Module):
    """BatchNorm, in-place ReLU, in-place addition, a weight that is used twice, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.classify = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.conv1.weight.mean()
        y = self.relu(y)
        return self.classify(self.dropout(self.pool(y).flatten(1)))


class Lstm(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(24, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return self.head(hidden)


def _ids(vocabulary: int = 99) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, 10))


def _mask() -> torch.Tensor:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "intermediate_size": 37, "vocab_size": 99, "max_position_embeddings": 64}


def _cnn() -> Example:
    return ConvNet(), (torch.randn(4, 3, 8, 8),), {}


def _lstm() -> Example:
    return Lstm(), (_ids(50),), {}


def _transformer() -> Example:
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    return model, (torch.randn(2, 5, 16), torch.randn(2, 6, 16)), {}


def _bert() -> Example:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**_TEXT))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


def _gpt2() -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


def _llama() -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=2))
    return model, (), {"input_ids": _ids(), "attention_mask": _mask()}


def _t5() -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=99,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _ids(), "attention_mask": _mask(), "decoder_input_ids": _ids()}
    return T5ForConditionalGeneration(config), (), inputs


def _whisper() -> Example:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99,
        num_mel_bins=80, max_source_positions=30, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(2, 80, 60),
        "decoder_input_ids": _ids(),
        "decoder_attention_mask": _mask(),
    }
    return WhisperForConditionalGeneration(config), (), inputs


def _vit() -> Example:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_SIZES, intermediate_size=37, image_size=30, patch_size=6)
    return ViTForImageClassification(config), (), {"pixel_values": torch.randn(2, 3, 30, 30)}


def _mamba() -> Example:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4, use_cache=False
    )
    return MambaForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


def _clip() -> Example:
    from transformers import CLIPConfig, CLIPModel

    vision = {**_SIZES, "intermediate_size": 37, "image_size": 30, "patch_size": 6}
    model = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=vision))
    inputs = {
        "input_ids": _ids(),
        "attention_mask": _mask(),
        "pixel_values": torch.randn(2, 3, 30, 30),
    }
    return model, (), inputs


def _mixtral() -> Example:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**_TEXT, "intermediate_size": 48}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config), (), {"input_ids": _ids(), "attention_mask": _mask()}


BUILDERS: dict[str, Callable[[], Example]] = {
    "cnn": _cnn,
    "lstm": _lstm,
    "transformer": _transformer,
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "whisper": _whisper,
    "vit": _vit,
    "mamba": _mamba,
    "clip": _clip,
    "mixtral": _mixtral,
}

every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(name)])
        for name in BUILDERS
    ],
)
"""Runs a test on each model. With `--dist loadgroup` a model is captured by one process only; that
is what takes the time, so all of these tests are slow, or the first would be, whichever it is."""

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])


def build(name: str) -> Example:
    """A fresh model, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[name]()


@functools.cache
def example(name: str) -> Example:
    """The one model that this process shares."""
    return build(name)


@functools.cache
def captured(name: str) -> Captured:
    """The shared model, captured."""
    return capture(*example(name))


@functools.cache
def stats(name: str) -> RangeStats:
    """Ranges of the shared model on its example inputs."""
    _, args, kwargs = example(name)
    return profile(captured(name), [(args, kwargs)])


def converted(
    name: str, rules: str = "default", dtype: torch.dtype = torch.float16
) -> ConvertedModel:
    """The shared model, converted."""
    return _converted(name, rules, dtype)


@functools.cache  # which would take an argument left out and its default for two things
def _converted(name: str, rules: str, dtype: torch.dtype) -> ConvertedModel:
    return convert_captured(captured(name), load_rules([rules]), stats(name), dtype)


@contextlib.contextmanager
def mode(*modules: nn.Module, train: bool = False) -> Iterator[None]:
    """Put the modules into eval or train mode, from random seed 1; flags and buffers come back."""
    flags = [(m, m.training) for root in modules for m in root.modules()]
    kept = [(b, b.detach().clone()) for root in modules for b in root.buffers()]
    try:
        for root in modules:
            root.train(train)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextlib.contextmanager
def fused_transformer(enabled: bool) -> Iterator[None]:
    """nn.Transformer's fused kernels, which eager PyTorch uses in eval mode without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
