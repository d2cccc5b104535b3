"""What tests of this folder share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.validate.training.gradient_step import StepTrace, TrainStep
from tests.staged import Staged

X = torch.linspace(-1, 1, 24).reshape(6, 4)


Y = torch.linspace(1, -1, 24).reshape(6, 4)


class Net(nn.Module):
    """BatchNorm, dropout, a view that is read twice, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(x)).view(-1, 2, 4)
        h = F.gelu(h).reshape(-1, 8)
        return self.last(self.drop(h)) * self.frozen


@functools.cache
def shared() -> Staged:
    """For tests that change nothing in it."""
    return staged()


def staged(model: Callable[[], nn.Module] = Net, *args: Any) -> Staged:
    torch.manual_seed(0)
    return Staged.of(model(), *(args or (X,)))


def step(
    of: Staged, loss: Any = F.mse_loss, args: Any = None, target: Any = Y, path: str = "net.py"
) -> TrainStep:
    return TrainStep(of.convert("fp32"), (args or of.args, {}, target), loss, path)


def by_hand(
    model: nn.Module, loss: Callable[[Any], torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Gradients by parameter from a plain eager backward pass on a copy of the model."""
    model = copy.deepcopy(model).train()
    with torch.random.fork_rng():
        value = loss(model(*args, **kwargs))
        value.backward()
    return float(value.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def both(given: TrainStep, of: Staged) -> list[StepTrace]:
    return [given.eager(), given.run(GradientProbe(of.captured), "FP32")]


class Branching(nn.Module):
    """A branch on values between two parts, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        if y.sum() > 1e9:
            y = -y
        return self.last(self.middle(self.middle(y))) * self.scale
