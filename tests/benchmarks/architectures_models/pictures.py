"""Models of pictures: transformers', timm's and diffusers'."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from unittest.mock import MagicMock

import torch
import transformers as hf
from torch import nn

from tests.benchmarks.architectures_models.architecture import Architecture, Inputs, picture
from tests.benchmarks.architectures_models.texts import VISION, of

CONVNEXT = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "image_size": 32}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6,
}  # fmt: skip


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(**RESNET, out_features=["stage2"])
    built: nn.Module = hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, **DETR))
    return built


def of_timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    """A model of timm. Its models import torchvision for data that none here loads, and torchvision
    does not import beside every build of PyTorch: its place is then taken by nothing."""

    def build() -> nn.Module:
        try:
            import torchvision  # noqa: F401
        except Exception:  # noqa: BLE001  it is missing, or its operators are
            for part in _TORCHVISION:
                sys.modules[f"torchvision{part}"] = _Absent(f"torchvision{part}")
        import timm

        built: nn.Module = timm.create_model(name, num_classes=10, **settings)
        nn.init.normal_(built.get_classifier().weight, std=0.02)  # type: ignore[operator]
        return built  # some begin with zeros, and give nothing but those

    return build


_TORCHVISION = (
    "", ".datasets", ".datasets.folder", ".datasets.utils", ".io", ".models",
    ".models.feature_extraction", ".ops", ".ops.misc", ".transforms", ".transforms.functional",
)  # fmt: skip


class _Absent(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def unet() -> nn.Module:
    import diffusers

    built: nn.Module = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    return built


def vae() -> nn.Module:
    import diffusers

    built: nn.Module = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    return built


def noisy(batch: int, side: int) -> Inputs:
    return {"sample": torch.rand(batch, 3, side, side), "timestep": torch.arange(batch) * 10}


VIT = {**VISION, "num_labels": 10}
_ANY, _SAMPLE = (64, 96, 128), (16, 32, 24)


def _transformers(name: str, build: Callable[[], nn.Module], side: int = 0) -> Architecture:
    """One for pictures of any side, or of one alone."""
    return Architecture(name, "transformers", build, picture, (side,) * 3 if side else _ANY)


def _timm(name: str, build: Callable[[], nn.Module], side: int = 0) -> Architecture:
    return Architecture(name, "timm", build, picture, (side,) * 3 if side else _ANY, "timm")


ARCHITECTURES = (
    _transformers("ViT", of(hf.ViTForImageClassification, hf.ViTConfig, **VIT), 30),
    _transformers("Swin", of(hf.SwinForImageClassification, hf.SwinConfig, **SWIN), 32),
    _transformers("ConvNeXt", of(hf.ConvNextForImageClassification, hf.ConvNextConfig, **CONVNEXT)),
    _transformers("ResNet", of(hf.ResNetForImageClassification, hf.ResNetConfig, **RESNET)),
    _transformers("DETR", detr),
    _timm("MobileNetV3", of_timm("mobilenetv3_small_050")),
    _timm("EfficientNet", of_timm("efficientnet_lite0")),
    _timm("RegNet", of_timm("regnetx_002")),
    _timm("MLP-Mixer", of_timm("mixer_s32_224", img_size=64), 64),
    _timm("DeiT", of_timm("deit_tiny_patch16_224", img_size=64), 64),
    Architecture("UNet", "diffusers", unet, noisy, _SAMPLE, "diffusers"),
    Architecture("AutoencoderKL", "diffusers", vae, picture, _SAMPLE, "diffusers"),
)
