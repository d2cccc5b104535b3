"""What a batch is, and what the user's metrics say of the outputs for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

Batch = tuple[Sequence[Any], Mapping[str, Any], Any]
"""(args, kwargs, target) of one call."""
LOSS, TRAIN_LOSS = "loss", "train_loss"
"""The names of the user's loss on eval batches, and on the last training batches."""
Score = Callable[[Any, Any], Mapping[str, float]]
"""The user's metrics: (outputs, target) to values by name."""


def no_score(outputs: Any, target: Any) -> Mapping[str, float]:  # noqa: ARG001  it is a `Score`
    """What a user who gives no metrics measures."""
    return {}


def anew(value: Any) -> Any:
    """The same in containers of its own: a model may write into a dict or list that it is given."""
    return pytree.tree_map(lambda leaf: leaf, value)


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs; 1 where there is none."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


@dataclass
class _Sums:
    """One metric of one arm: its sum over samples, how many these are, and its value by batch."""

    total: float = 0.0
    samples: int = 0
    values: dict[int, tuple[float, int]] = field(default_factory=dict)


class MetricMeans:
    """The user's metrics of several arms: means over batches, weighted by their size."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, _Sums]] = {}
        self._samples: dict[str, int] = {}
        self._batches: dict[str, int] = {}

    def add(self, arm: str, values: Mapping[str, float], size: int) -> None:
        """Take in an arm's metrics for its next batch, of `size` samples."""
        sums = self._sums.setdefault(arm, {})
        self._samples[arm] = self.samples(arm) + size
        batch = self._batches[arm] = self._batches.get(arm, -1) + 1
        for name, value in values.items():
            found = sums.setdefault(name, _Sums())
            found.total += value * size
            found.samples += size
            found.values[batch] = value, size

    def drop(self, arm: str) -> None:
        """Forget an arm that did not see all batches."""
        for table in (self._sums, self._samples, self._batches):
            table.pop(arm, None)

    def samples(self, arm: str) -> int:
        """How many samples an arm has seen."""
        return self._samples.get(arm, 0)

    def of(self, arm: str) -> dict[str, float]:
        """The means by name, each over the batches that gave it; empty for an arm never seen."""
        sums = self._sums.get(arm, {})
        return {n: s.total / s.samples if s.samples else math.nan for n, s in sums.items()}

    def complete(self, arm: str) -> dict[str, float]:
        """Those of the means that every batch gave."""
        seen = self._sums.get(arm, {})
        return {n: v for n, v in self.of(arm).items() if seen[n].samples == self.samples(arm)}

    def value(self, arm: str, name: str) -> float:
        """One mean; NaN where the arm has no such metric."""
        return self.of(arm).get(name, math.nan)

    def names(self, *arms: str) -> list[str]:
        """The metrics that any of these arms has."""
        return list(dict.fromkeys(name for arm in arms for name in self._sums.get(arm, {})))

    def unpaired(self, name: str, one: str, other: str) -> int:
        """The number of batches on which only one of two arms has a metric."""
        return len(self._of(one, name).keys() ^ self._of(other, name).keys())

    def standard_error(self, name: str, one: str, other: str) -> float | None:
        """That of the mean difference between two arms, from their differences batch by batch,
        weighted by batch size: sqrt(Σ w² (d - D)²) / Σ w · sqrt(n / (n - 1)). None with fewer than
        two batches that both have."""
        mine, theirs = self._of(one, name), self._of(other, name)
        pairs = [(theirs[b][0] - v, size) for b, (v, size) in mine.items() if b in theirs]
        weight = sum(size for _, size in pairs)
        if len(pairs) < 2 or not weight:
            return None
        mean = sum(d * size for d, size in pairs) / weight
        squares = sum((size * (d - mean)) ** 2 for d, size in pairs)
        return math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / weight

    def spread(self, arm: str, name: str) -> float:
        """The standard deviation from batch to batch of a metric that takes both signs: relative to
        its value, a change of it says nothing. 0 for any other metric."""
        values = [value for value, _ in self._of(arm, name).values()]
        if not all(map(math.isfinite, values)) or not min(values, default=0) < 0 < max(values):
            return 0.0
        return statistics.pstdev(values)

    def varies(self, arm: str, name: str) -> bool:
        """Whether a metric is another one on some batch."""
        return len({value for value, _ in self._of(arm, name).values()}) > 1

    def _of(self, arm: str, name: str) -> dict[int, tuple[float, int]]:
        return self._sums.get(arm, {}).get(name, _Sums()).values
