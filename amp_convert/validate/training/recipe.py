"""What a model is trained with: the loop's settings and the user's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from amp_convert.validate.training.gradient_step import Loss
from amp_convert.validate.training.loss_scaling import LossScaling


@dataclass(frozen=True, eq=False)
class Recipe:
    """What all arms are trained with; `path` is the file that holds the functions.

    `accumulate` batches make a step, their losses averaged; gradients are clipped to the L2 norm
    `clip_norm` where that is not None.
    """

    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    scaling: LossScaling = field(default_factory=LossScaling)
    accumulate: int = 1
    clip_norm: float | None = None
    path: str = ""

    def starting_at(self, scale: float) -> Recipe:
        """The recipe, a dynamic loss scale starting at one that the gradients bear: else the steps
        that look for it would be left out of the mixed arm alone, and decide a metric."""
        scaling = self.scaling
        if scaling.kind != "dynamic" or not scale < scaling.initial:
            return self
        return replace(self, scaling=replace(scaling, initial=max(scale, 1.0)))


def in_words(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, str]:
    """The optimizer and the schedule in words, before the first step."""
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    name, schedule = type(optimizer).__name__, type(scheduler).__name__
    if rates:
        name += f", learning rate {', '.join(f'{rate:g}' for rate in rates)}"
    return {"optimizer": name, "schedule": "none" if scheduler is None else schedule}
