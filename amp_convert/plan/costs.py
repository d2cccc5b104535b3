"""What a plan costs: casts, and regions that stay FP32. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Casts:
    """How many casts a plan puts into one graph.

    `activations` counts distinct (value, dtype) pairs, `weights` those of parameters and buffers,
    which freezing removes. `borders` counts the edges on which the dtype changes: an upper bound.
    """

    activations: int = 0
    weights: int = 0
    borders: int = 0

    def __add__(self, other: Casts) -> Casts:
        return Casts(
            self.activations + other.activations,
            self.weights + other.weights,
            self.borders + other.borders,
        )


@dataclass(frozen=True)
class StoredTwice:
    """A weight that a frozen model holds in FP32 and in low precision. `low_bytes` are those of the
    low copy; `reader` is the first node that reads it in FP32, and `reason` and `evidence` are why
    that node does."""

    weight: str
    low_bytes: int
    reader: str
    reason: str
    evidence: str


@dataclass(frozen=True)
class Island:
    """One FP32 region of the eval graph, for the example inputs.

    `layer`, `op`, `reason` and `evidence` are those of the node that keeps it in FP32; `ops` its
    operators with their counts, `nodes` how many there was something to decide about. `casts` are
    those of activations at its borders, `cast_bytes` what they read and write together,
    `wider_bytes` what its results take up more than they would in low precision.
    """

    layer: str
    op: str
    reason: str
    evidence: str
    ops: tuple[tuple[str, int], ...]
    nodes: int
    casts: int
    cast_bytes: int
    wider_bytes: int
