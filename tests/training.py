"""Small models in training, and the loops that PyTorch's users write, to hold ours against."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.capture.regions import capture
from amp_convert.core.batches import Batch
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.recipe import Recipe
from tests import zoo

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
}


@dataclass
class Trained:
    """A model of the zoo with batches of its own kind."""

    name: str

    def __post_init__(self) -> None:
        self.model, self.args, self.kwargs = zoo.build(self.name)

    def converted(
        self, dtype: torch.dtype = torch.float16, preset: str = "default"
    ) -> ConvertedModel:
        captured = capture(self.model, self.args, self.kwargs)
        stats = profile(captured, [(self.args, self.kwargs)], [dtype])
        return convert_captured(captured, load_rules([preset]), stats, dtype)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches without an end, from a generator of their own."""
        source = torch.Generator().manual_seed(seed)
        while True:
            yield drawn(self.args, source), drawn(self.kwargs, source), None

    @property
    def data(self) -> Data:
        return Data(self.batches)


def drawn(tree: Any, source: torch.Generator) -> Any:
    """New values for every tensor: integers of the same range, floats of the same spread."""
    if isinstance(tree, dict):
        return {key: drawn(value, source) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(drawn(value, source) for value in tree)
    if not isinstance(tree, torch.Tensor):
        return tree
    if tree.is_floating_point():
        return torch.randn(tree.shape, generator=source)
    low, high = int(tree.min()), int(tree.max()) + 1
    return torch.randint(low, high, tree.shape, generator=source)


def loss(outputs: Any, target: Any) -> torch.Tensor:
    """Cross entropy of the logits against five labels in turn."""
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
    labels = torch.arange(logits[..., 0].numel()) % 5
    return F.cross_entropy(logits.flatten(0, -2), labels)


def recipe(optimizer: str = "adamw", **options: Any) -> Recipe:
    return Recipe(loss, OPTIMIZERS[optimizer], **options)


def by_hand(
    trained: Trained,
    model: nn.Module,
    recipe: Recipe,
    steps: int,
    *,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """The loop of PyTorch's guide to automatic mixed precision; gives the losses."""
    torch.manual_seed(seed)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=recipe.scaling.initial, enabled=recipe.scaling.kind != "none"
    )
    optimizer = recipe.optimizer(model.parameters())
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    losses = []
    source = trained.batches(seed)
    model.train()
    for _ in range(steps):
        total = 0.0
        for _ in range(recipe.accumulate):
            args, kwargs, target = next(source)
            context = (
                torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
            )
            with context:
                value = recipe.loss(model(*args, **kwargs), target)
            total += value.item()
            scaler.scale(value / recipe.accumulate).backward()
        losses.append(total / recipe.accumulate)
        if recipe.clip_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None and scaler.get_scale() >= before:
            scheduler.step()
        optimizer.zero_grad()
    return losses


class Net(nn.Module):
    """Dropout and BatchNorm: random numbers and buffers matter. Trains in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def initial_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def points(seed: int, count: int | None = None) -> Iterator[Batch]:
    """Points in eight dimensions, in three classes that a plane cannot quite part."""
    source = torch.Generator().manual_seed(seed)
    for _ in itertools.count() if count is None else range(count):
        x = torch.randn(32, 8, generator=source)
        yield (x,), {}, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def classify(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, target)


def score(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"accuracy": float((outputs.argmax(1) == target).double().mean())}


POINTS = Data(points, lambda: points(999, 3), score, initial_model)


def convert_net(dtype: torch.dtype, preset: str = "default") -> ConvertedModel:
    model, args = initial_model(0).eval(), (torch.randn(4, 8),)
    captured = capture(model, args, {})
    stats = profile(captured, [(args, {})], [dtype])
    return convert_captured(captured, load_rules([preset]), stats, dtype)
