"""What tests of this folder share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.validate.training.gradient_results import GradientParity
from tests.staged import Staged
from tests.validate.training.gradient_steps import Net
from tests.zoo import converted, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)


Y = torch.linspace(1, -1, 24).reshape(6, 4)


def staged(model: nn.Module, *args: Any) -> Staged:
    return Staged.of(model, *(args or (X,)))


@functools.cache
def net() -> Staged:
    """For tests that change nothing in it."""
    torch.manual_seed(0)
    return staged(Net())


def parity(mixed: ConvertedModel, loss: Any = F.mse_loss, **options: Any) -> GradientParity:
    torch.manual_seed(3)
    return compare_gradients(mixed, (X,), {}, Y, loss, **options)


def of_zoo(name: str, factor: float = 1.0, **options: Any) -> GradientParity:
    """The parity of a shared model on its example inputs, with the loss times `factor`."""
    scale = options.pop("scale", 1.0)
    _, args, kwargs = example(name)

    def loss(outputs: Any, target: Any) -> torch.Tensor:
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
        labels = torch.arange(logits[..., 0].numel()) % 5
        return F.cross_entropy(logits.flatten(0, -2), labels) * factor

    mixed = converted(name, **options)
    with mode(mixed.captured.model):
        return compare_gradients(mixed, args, kwargs, None, loss, scale=scale)
