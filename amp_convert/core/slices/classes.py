"""The classes of an output: how many elements of each have another class in the value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from amp_convert.core.slices.slice_error import (
    LEAST,
    MOST_CHANNELS,
    SliceError,
    SliceKind,
)

_MOST_CLASSES = 64
"""So many classes are kept: those with the largest share of changed elements for their size."""


@dataclass
class ClassSums:
    """How many elements of each class have another class in the value, and in the noise."""

    kind: SliceKind
    axis: int | None = None
    _rows: dict[int, list[int]] = field(default_factory=dict)

    def add(
        self, reference: torch.Tensor, value: torch.Tensor, noise: torch.Tensor | None = None
    ) -> None:
        """Take in one batch of integers or booleans of one shape."""
        classes, inverse = torch.unique(reference.detach().cpu(), return_inverse=True)
        names = [int(name) for name in classes.tolist()]
        if len(self._rows.keys() | set(names)) > MOST_CHANNELS:
            return  # those are numbers, not classes
        counts = torch.bincount(inverse.flatten(), minlength=len(classes))
        changed = [
            torch.bincount(inverse[(reference != other).cpu()], minlength=len(classes))
            if other is not None
            else torch.zeros_like(counts)
            for other in (value, noise)
        ]
        for i, name in enumerate(names):
            row = self._rows.setdefault(name, [0, 0, 0])
            for at, counted in enumerate((counts, *changed)):
                row[at] += int(counted[i])

    def slices(self) -> tuple[SliceError, ...]:
        """The classes that are changed most, of those that have enough elements."""
        found = [
            SliceError(self.kind, name, changed / count, noise / count, count, self.axis)
            for name, (count, changed, noise) in self._rows.items()
            if count >= LEAST and changed
        ]
        found.sort(key=lambda row: -row.error * math.sqrt(row.elements))
        return tuple(found[:_MOST_CLASSES])
