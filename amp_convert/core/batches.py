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


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs; 1 where there is none."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


class MetricMeans:
    """The user's metrics for the outputs of several arms: means over the batches that give them,
    weighted by size."""

    def __init__(self, score: Score | None) -> None:
        self._score = score
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}

    def add(self, arm: str, outputs: Any, target: Any, size: int) -> None:
        """Take in an arm's outputs for one batch; nothing where the user gives no metrics."""
        if self._score is not None:
            sums = self._sums.setdefault(arm, {})
            for name, value in self._score(outputs, target).items():
                total, samples = sums.get(name, (0.0, 0))
                sums[name] = (total + value * size, samples + size)

    def drop(self, arm: str) -> None:
        """Forget an arm that did not see all batches."""
        self._sums.pop(arm, None)

    def of(self, arm: str) -> dict[str, float]:
        """The means by name; empty for an arm that was never seen."""
        sums = self._sums.get(arm, {})
        return {n: total / samples if samples else math.nan for n, (total, samples) in sums.items()}

    def value(self, arm: str, name: str) -> float:
        """One mean; NaN where the arm has no such metric."""
        return self.of(arm).get(name, math.nan)
