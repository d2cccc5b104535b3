"""Do the user's metrics judge anything? Tried on the first batches, before their values are used.

The FP32 outputs are scored, then outputs that are certainly others (the same with the sign turned
and the samples in another order, and zeros), then the FP32 outputs again. A metric that gives
another value the second time keeps state from call to call, so one arm's values would be spoilt by
the other's. One that gives the same for all of them, on every batch that is tried, does not look at
the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from amp_convert.core.batches import Score
from amp_convert.core.tree_paths import map_tensors
from amp_convert.validate.inference.results import MetricDoubt

BATCHES = 4
"""How many batches are tried."""


class MetricProbe:
    """What the tried batches have shown of each metric."""

    def __init__(self, score: Score) -> None:
        self._score, self._tried = score, 0
        self._tried_names: set[str] = set()
        self._alive: set[str] = set()
        self._stateful: set[str] = set()

    def try_batch(self, outputs: Any, target: Any) -> None:
        """Try one batch of FP32 outputs; nothing after the first `BATCHES`."""
        if self._tried >= BATCHES:
            return
        self._tried += 1
        first = self._score(outputs, target)
        self._tried_names |= first.keys()
        if first.keys() <= self._alive | self._stateful:
            return
        for changed in (_turned, torch.zeros_like):
            scores = self._scored(outputs, target, changed)
            self._alive |= {n for n in first if not _same(first[n], scores.get(n, math.nan))}
        again = self._score(outputs, target)
        self._stateful |= {n for n in first if not _same(first[n], again.get(n, math.nan))}

    def _scored(
        self, outputs: Any, target: Any, changed: Callable[[torch.Tensor], torch.Tensor]
    ) -> Mapping[str, float]:
        try:
            return self._score(map_tensors(changed, outputs), target)
        except Exception:  # noqa: BLE001  a metric that refuses such outputs looks at them
            return {}

    def doubt(self, name: str, *, varies: bool = False) -> MetricDoubt | None:
        """Why a metric judges nothing, if it does; one that `varies` from batch to batch may have
        had nothing to look for in those that were tried."""
        if name in self._stateful:
            return MetricDoubt.STATEFUL
        dead = name in self._tried_names - self._alive and not varies
        return MetricDoubt.CONSTANT if dead else None


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """Other values: the sign turned, and the samples in another order."""
    if not tensor.dim() or not tensor.numel():
        return tensor.clone()
    moved = tensor.roll(1, 0)
    if tensor.dtype == torch.bool:
        return ~moved
    return -moved if tensor.is_floating_point() or tensor.is_complex() else moved + 1


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
