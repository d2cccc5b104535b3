"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.core.batches import Batch
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.seed_spread import (
    Conditions,
    SeedSpread,
    make_seed_spread,
)

HERE = Conditions(digest="d" * 64, device="cpu", steps=3, accumulate=2, clip_norm=0.5, batches=8)


def build(seed: int) -> nn.Module:
    """With dropout, so that the random state of each seed matters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(seed: int) -> Iterator[Batch]:
    source = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randn(6, 4, generator=source)
        yield (inputs,), {}, inputs[:, :3].argmax(1)


def eval_batches() -> Iterator[Batch]:
    stream = batches(7)
    first, second = next(stream), next(stream)
    yield first
    yield (second[0][0][:2],), {}, second[2][:2]  # a smaller batch counts for less


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"margin": float(outputs.gather(1, target[:, None]).mean()), "constant": 1.0}


RECIPE = Recipe(
    loss=F.cross_entropy,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    accumulate=2,
    clip_norm=0.5,
)


DATA = Data(batches, eval_batches, accuracy, build)


def make(**options: Any) -> SeedSpread:
    given = {"model": build(3), "recipe": RECIPE, "data": DATA, "conditions": HERE}
    return make_seed_spread(**{**given, "name": "net", "seeds": 8, **options})
