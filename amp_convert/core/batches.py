"""What a batch is, and what the user's metrics say of the outputs for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Batch = tuple[Sequence[Any], Mapping[str, Any], Any]
"""(args, kwargs, target) of one call."""
Score = Callable[[Any, Any], Mapping[str, float]]
"""The user's metrics: (outputs, target) to values by name."""


def no_score(outputs: Any, target: Any) -> Mapping[str, float]:  # noqa: ARG001  it is a `Score`
    """What a user who gives no metrics measures."""
    return {}


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs; 1 where there is none."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


class MetricMeans:
    """The user's metrics of several arms: means over batches, weighted by their size."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}
        self._samples: dict[str, int] = {}

    def add(self, arm: str, values: Mapping[str, float], size: int) -> None:
        """Take in an arm's metrics for one batch of `size` samples."""
        sums = self._sums.setdefault(arm, {})
        self._samples[arm] = self.samples(arm) + size
        for name, value in values.items():
            total, samples = sums.get(name, (0.0, 0))
            sums[name] = (total + value * size, samples + size)

    def drop(self, arm: str) -> None:
        """Forget an arm that did not see all batches."""
        self._sums.pop(arm, None)
        self._samples.pop(arm, None)

    def samples(self, arm: str) -> int:
        """How many samples an arm has seen."""
        return self._samples.get(arm, 0)

    def of(self, arm: str) -> dict[str, float]:
        """The means by name, each over the batches that gave it; empty for an arm never seen."""
        sums = self._sums.get(arm, {})
        return {n: total / samples if samples else math.nan for n, (total, samples) in sums.items()}

    def complete(self, arm: str) -> dict[str, float]:
        """Those of the means that every batch gave."""
        seen = self._sums.get(arm, {})
        return {n: v for n, v in self.of(arm).items() if seen[n][1] == self.samples(arm)}

    def value(self, arm: str, name: str) -> float:
        """One mean; NaN where the arm has no such metric."""
        return self.of(arm).get(name, math.nan)
