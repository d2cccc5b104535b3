"""What is open around a paired run, and what its arms start from and are measured by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from amp_convert.capture.gradient_probe import real_gradient
from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core import number_formats
from amp_convert.core.errors import first_line
from amp_convert.core.random_state import preserved_rng
from amp_convert.core.tensor_errors import ErrorSums
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.weights import Weights


@contextlib.contextmanager
def training(model: nn.Module, converted: ConvertedModel | None) -> Iterator[None]:
    """Train mode, exact FP32, gradients on; the model and the random state are afterwards as they
    were, whatever the user's code has done to them."""
    device = devices.of_model(model)
    weights = Weights(model)
    before = weights.get()
    copies = {name: tensor.detach().clone() for name, tensor in before.items()}
    kept = {p: (p.grad, p.requires_grad) for p in weights.parameters.values()}
    with (
        in_mode(model, training=True),
        mode_of(converted, training=True),
        devices.exact_fp32(device),
        preserved_rng(device),
        devices.plain_mode(device),
    ):
        for parameter in kept:
            parameter.grad = None
        try:
            yield
        finally:
            for name, tensor in before.items():
                tensor.detach().copy_(copies[name])
            weights.put(before)
            for parameter, (gradient, trained) in kept.items():
                parameter.grad = gradient
                parameter.requires_grad_(trained)


@contextlib.contextmanager
def mode_of(converted: ConvertedModel | None, *, training: bool) -> Iterator[None]:
    """The mode of the converted model, whose parts follow the original's."""
    if converted is None:
        yield
        return
    before, converted.training = converted.training, training
    try:
        yield
    finally:
        converted.training = before


@contextlib.contextmanager
def native_autocast(device: torch.device, low: torch.dtype) -> Iterator[None]:
    """Native autocast. It forgets its cast weights at its end, as it does when it is not nested in
    another one (`plain_mode` is one): at the next step they would be those of this step."""
    try:
        with torch.autocast(device.type, dtype=low):
            yield
    finally:
        torch.clear_autocast_cache()


def autocast_failure(error: Exception) -> str:
    return f"the original fails under torch.autocast: {first_line(error)}"


def nudged(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The tensors with every FP32 parameter moved by one ULP, up or down by a coin."""
    coin = torch.Generator().manual_seed(0)
    moved = dict(tensors)
    for name in parameters:
        moved[name] = number_formats.nudged(tensors[name], coin)
    return moved


def weight_distance(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], weights: Weights
) -> float:
    """The L2 distance of two sets of weights, buffers left out, in FP64."""
    sums = ErrorSums()
    for name in weights.parameters:
        if a[name].is_floating_point() or a[name].is_complex():
            sums.add(real_gradient(b[name]), real_gradient(a[name]))
    return math.sqrt(sums.difference) if sums.difference >= 0 else math.nan


def widened_outputs(tensor: torch.Tensor) -> torch.Tensor:
    low = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if low else tensor
