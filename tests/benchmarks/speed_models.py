"""The models whose speed is measured, of random weights at their usual sizes.

Two sizes of input: `full` for a GPU, `small` for a CPU. Only transformers is needed, no download.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Vit(nn.Module):
    """ViT-B/16 as torchvision has it: `nn.MultiheadAttention` on inputs that are not transposed
    back, MLPs whose biases start at 1e-6."""

    def __init__(self, layers: int = 12, size: int = 224) -> None:
        super().__init__()
        width, heads = 768, 12
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size // 16) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x)
        x = x.reshape(x.shape[0], 768, -1).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 3072), nn.GELU(), nn.Linear(3072, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UNet(nn.Module):
    """Three levels of two convolutions with BatchNorm, joined across."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(map(_convs, sizes[:-1], sizes[1:]))
        self.up = nn.ModuleList(
            _convs(a + b, b) for a, b in ((4 * width, 2 * width), (2 * width, width))
        )
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, across in zip(self.up, reversed(kept[:-1]), strict=True):
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), across], 1))
        return self.last(x)


def _convs(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [
            nn.Conv2d(channels, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class Lstm(nn.Module):
    """Two LSTM layers of 512 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10_000, 512)
        self.lstm = nn.LSTM(512, 512, 2, batch_first=True)
        self.head = nn.Linear(512, 10_000)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


def _ids(rows: int, length: int, vocabulary: int = 10_000) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length))


def _text(config: Any, model: Any, rows: int, length: int) -> Example:
    ids = _ids(rows, length)
    return model(config), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(rows: int, size: int = 224) -> torch.Tensor:
    return torch.randn(rows, 3, size, size)


def _bert(full: bool) -> Example:
    from transformers import BertConfig, BertModel

    layers = 12 if full else 4
    return _text(
        BertConfig(num_hidden_layers=layers), BertModel, *((32, 128) if full else (8, 128))
    )


def _gpt2(full: bool) -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12 if full else 4, use_cache=False)
    return _text(config, GPT2LMHeadModel, *((8, 512) if full else (2, 256)))


def _llama(full: bool) -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12 if full else 4,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=32_000, use_cache=False,
    )  # fmt: skip
    return _text(config, LlamaForCausalLM, *((4, 512) if full else (2, 128)))


def _t5(full: bool) -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    layers, (rows, length) = (6, (16, 256)) if full else (3, (4, 128))
    model = T5ForConditionalGeneration(
        T5Config(num_layers=layers, decoder_start_token_id=0, use_cache=False)
    )
    ids = _ids(rows, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, (), {**inputs, "decoder_input_ids": _ids(rows, length // 2)}


def _resnet(full: bool) -> Example:
    from transformers import ResNetConfig, ResNetForImageClassification

    return (
        ResNetForImageClassification(ResNetConfig()),
        (),
        {"pixel_values": _images(64 if full else 4)},
    )


def _mobilenet(full: bool) -> Example:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    model = MobileNetV2ForImageClassification(MobileNetV2Config())
    return model, (), {"pixel_values": _images(64 if full else 4)}


def _convnext(full: bool) -> Example:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    model = ConvNextForImageClassification(ConvNextConfig())
    return model, (), {"pixel_values": _images(64 if full else 2)}


def _vit(full: bool) -> Example:
    return Vit(layers=12 if full else 4), (_images(64 if full else 4),), {}


def _hf_vit(full: bool) -> Example:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(num_hidden_layers=12 if full else 4)
    return ViTModel(config), (), {"pixel_values": _images(64 if full else 4)}


def _unet(full: bool) -> Example:
    return UNet(), (_images(16 if full else 1, 256 if full else 128),), {}


def _lstm(full: bool) -> Example:
    return Lstm(), (_ids(*((64, 128) if full else (8, 64))),), {}


def _mamba(full: bool) -> Example:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=512, num_hidden_layers=4 if full else 1, vocab_size=10_000, use_cache=False
    )
    return MambaForCausalLM(config), (), {"input_ids": _ids(*((4, 64) if full else (2, 16)))}


def _whisper(full: bool) -> Example:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers, rows = (4, 8) if full else (2, 1)
    config = WhisperConfig(encoder_layers=layers, decoder_layers=layers, use_cache=False)
    inputs = {"input_features": torch.randn(rows, 80, 3000), "decoder_input_ids": _ids(rows, 64)}
    return WhisperForConditionalGeneration(config), (), inputs


def _small_batch(build: Callable[[bool], Example]) -> Callable[[bool], Example]:
    """The same model at batch 2, where what Python costs shows."""

    def built(full: bool) -> Example:
        model, args, kwargs = build(full)
        cut = {name: value[:2] for name, value in kwargs.items()}
        return model, tuple(value[:2] for value in args), cut

    return built


MODELS: dict[str, Callable[[bool], Example]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "resnet50": _resnet,
    "mobilenetv2": _mobilenet,
    "convnext": _convnext,
    "vit-torchvision": _vit,
    "vit-transformers": _hf_vit,
    "t5": _t5,
    "lstm": _lstm,
    "unet": _unet,
    "mamba": _mamba,
    "whisper": _whisper,
    "bert-batch2": _small_batch(_bert),
    "resnet50-batch2": _small_batch(_resnet),
}


def build(name: str, *, full: bool) -> Example:
    """A fresh model in eval mode with its inputs, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args, kwargs = MODELS[name](full)
    return model.eval(), args, kwargs
