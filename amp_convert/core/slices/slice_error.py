"""What is kept of a slice, and which slices of a kind are worth keeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

LEAST = 8

FAINT, FLAT = 1e-6, 0.1

SILENT = 1e-6
"""Noise under this excuses nothing: no tolerance above 0 is as small."""

MOST_CHANNELS = 262_144
"""As many as the largest vocabularies of language models have words."""


class SliceKind(StrEnum):
    """What a slice of an output is."""

    WHOLE = "whole"
    CHANNEL = "channel"
    FAINT_CHANNEL = "faint channel"
    """One that hardly varies beside the others."""
    FEW = "few elements"
    """A channel, or an output, of too few elements to be one of those."""
    SAMPLE = "sample"
    FAINT_SAMPLE = "faint sample"
    """One that is nearly flat beside the others."""
    CLASS = "class"
    """A value of an integer or boolean output."""
    LARGEST = "largest"
    """An index at which a floating point output is largest."""


@dataclass(frozen=True)
class SliceError:
    """The error of one slice of an output, by what the slice itself says.

    `index` is that of the channel, of the sample in `batch`, or the class; `dim` the dimension of a
    channel. `error` is relative to the slice's spread; of a class, the share of its elements that
    changed theirs. `noise` is the same of FP32 nudged by one ULP.
    """

    kind: SliceKind
    index: int
    error: float
    noise: float
    elements: int
    dim: int | None = None
    batch: int | None = None


def frontier(slices: Sequence[SliceError]) -> list[SliceError]:
    """Those that are worse than all of less noise; NaN is the worst there is. Noise that no
    tolerance is as small as does not count."""
    kept: list[SliceError] = []
    least = math.inf
    for each in sorted(slices, key=lambda s: (-_size(s.error), _size(s.noise))):
        noise = max(_size(each.noise), SILENT)
        if not kept or noise < least:
            kept.append(each)
            least = noise
    return kept


def _size(error: float) -> float:
    return math.inf if math.isnan(error) else error
