"""`Kind`: a model of one kind, its inputs and, where it has a loss, its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Kind:
    """A model and its data: `batch` draws (inputs, target), and `build` the first weights.

    A model with a `loss` is first trained for `steps`, so that its outputs mean something.
    `package` is one that it needs beside those of the tests.
    """

    name: str
    field: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Loss | None = None
    package: str = ""
    steps: int = 80
    rate: float = 3e-3

    @property
    def missing(self) -> str:
        """Why it cannot be judged here; empty where it can."""
        there = not self.package or find_spec(self.package)
        return "" if there else f"{self.package} is not installed"

    def initial(self, seed: int) -> nn.Module:
        """The model before any training."""
        torch.manual_seed(seed)
        return self.build()

    def example(self) -> Any:
        """The inputs that the model is captured with."""
        return self.batch(torch.Generator().manual_seed(7))[0]

    def evals(self) -> list[Batch]:
        """Batches to judge on; none is the example."""
        g = torch.Generator().manual_seed(99)
        return [self.batch(g) for _ in range(4)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Batches to train on."""
        g = torch.Generator().manual_seed(1000 + seed)
        for _ in range(400):
            yield self.batch(g)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """What all of them are trained with."""
        return torch.optim.AdamW(parameters, self.rate)

    def trained(self) -> nn.Module:
        """The model in eval mode, trained where it has a loss."""
        model = self.initial(0)
        if self.loss is None:
            return model.eval()
        model.train()
        optimizer, batches = self.optimizer(model.parameters()), self.train_batches(1)
        for _, (inputs, target) in zip(range(self.steps), batches, strict=False):
            optimizer.zero_grad()
            self.loss(called(model, inputs), target).backward()
            optimizer.step()
        return model.eval()


def called(model: nn.Module, inputs: Any) -> Any:
    """What the model returns for inputs in any of their three forms."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def classify(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy; classes are the last dimension."""
    return F.cross_entropy(outputs.flatten(0, -2), target.flatten())


def squares(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean squared error."""
    return F.mse_loss(outputs, target)
