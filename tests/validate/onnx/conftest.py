"""Fixtures of the tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import amp_convert as amp
from amp_convert.onnx_file.write import OnnxModel, export_onnx
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.validate.onnx.blocks import Block


@pytest.fixture
def block(tmp_path: Path) -> tuple[ConvertedModel, OnnxModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    mixed = amp.convert(Block().eval(), x)
    return mixed, export_onnx(mixed, tmp_path / "block.onnx"), x
