"""The state in which models are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.random_state import preserved_rng
from amp_convert.rewrite.converted_model import ConvertedModel


@contextlib.contextmanager
def evaluating(converted: ConvertedModel) -> Iterator[None]:
    """Eval mode, no gradients, FP32 products exact; everything as before afterwards."""
    device = converted.captured.device
    with (
        in_mode(converted.captured.model, training=False),
        in_mode(converted, training=False),
        torch.no_grad(),
        devices.exact_fp32(device),
        preserved_rng(device),
    ):
        yield
