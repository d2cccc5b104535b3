"""What tests of this folder share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.compare import compare
from amp_convert.validate.inference.results import Divergence


def on(mixed: ConvertedModel, *inputs: torch.Tensor, **options: Any) -> Divergence:
    """Compare on batches of one positional input each."""
    return compare(mixed, [((x,), {}, None) for x in inputs], **options)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def flat(parts: list[torch.Tensor]) -> NDArray[np.float64]:
    return np.concatenate([t.detach().double().numpy().ravel() for t in parts])


def rel_l2(want: list[torch.Tensor], have: list[torch.Tensor]) -> float:
    a, b = flat(want), flat(have)
    return float(np.linalg.norm(b - a) / np.linalg.norm(a))
