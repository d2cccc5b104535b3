"""`Architecture`: a public model in a tiny configuration, and calls of it of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Inputs = Any
"""A tensor, a tuple of positional inputs or a dict of keywords."""


@dataclass(frozen=True)
class Architecture:
    """`call` gives inputs for a batch and a size: a length, or the side of a picture. The first of
    `sizes` is the example's, batches have the first two, and the third is seen by nobody before the
    model is called with it. `package` is one that it needs beside those of the tests."""

    name: str
    source: str
    build: Callable[[], nn.Module]
    call: Callable[[int, int], Inputs]
    sizes: tuple[int, int, int] = (10, 14, 12)
    package: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot be built here; empty where it can."""
        there = not self.package or find_spec(self.package)
        return "" if there else f"{self.package} is not installed"

    def model(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(0)
        return self.build().eval()

    def inputs(self, batch: int, size: int, seed: int = 0) -> Inputs:
        """Inputs, the same each time."""
        torch.manual_seed(1_000_000 * seed + 1_000 * batch + size)
        return self.call(batch, size)


VOCABULARY = 99


def ids(batch: int, length: int) -> torch.Tensor:
    """Codes of words, but for those that configurations reserve."""
    return torch.randint(5, VOCABULARY, (batch, length))


def mask(batch: int, length: int) -> torch.Tensor:
    """An attention mask; the first sample is padded."""
    found = torch.ones(batch, length, dtype=torch.long)
    found[0, -2:] = 0
    return found


def text(batch: int, length: int) -> Inputs:
    """What most language models take."""
    return {"input_ids": ids(batch, length), "attention_mask": mask(batch, length)}


def picture(batch: int, side: int) -> Inputs:
    """Pixels."""
    return torch.rand(batch, 3, side, side)
