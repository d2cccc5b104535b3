"""`Budget`: which node's rounding the outputs' error comes from. Plain data.

All errors are relative L2 of the outputs against FP32. Of several outputs the squares are added up,
each relative to its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

HOLDS = 2.0
"""How far the predicted error may be from the measured one, as a factor, for it to be believed."""


class Doubt(StrEnum):
    """Why first order does not hold: a node's share is not what converting it alone would give."""

    ADDITIVITY = "additivity"
    """The predicted error is not the measured one, by more than a factor of two."""
    CHOICES = "choices"
    """Rounding changes what a node that ranks chooses, as a router does: no gradient shows it."""
    NONFINITE = "nonfinite"
    """A value overflows: it has no share, and is first."""
    NO_GRADIENT = "no-gradient"
    """No gradient reaches an output: what is known was tried, a node at a time."""


@dataclass(frozen=True)
class NodeShare:
    """What one node's own rounding adds to the error of the outputs.

    `rel_l2` is its part alone, `share` that of the sum of squares over all nodes, and
    `standard_error` that of `rel_l2` over the random projections. `floor_rel_l2` is what the same
    node adds in FP32, None where that could not be measured; `cast_rel_l2` what casting its FP32
    result to low precision would add, None where that was not asked for; `trial_rel_l2` the error
    of the outputs that was measured with this node's rounding and no other, None where it was not
    tried.
    """

    node: str
    layer: str
    op: str
    dtype: str
    rel_l2: float
    share: float
    standard_error: float
    floor_rel_l2: float | None = None
    trial_rel_l2: float | None = None
    cast_rel_l2: float | None = None


@dataclass(frozen=True)
class LayerShare:
    """The nodes of one layer together; `node` is the one that adds most."""

    layer: str
    node: str
    op: str
    rel_l2: float
    share: float
    floor_rel_l2: float | None


@dataclass(frozen=True)
class Budget:
    """The error of the outputs on one batch of `samples`, node by node.

    `predicted_rel_l2` is the root of the sum of the nodes' squares, as if they were independent;
    `first_order_rel_l2` adds them up with their signs, so the two part where nodes' errors cancel
    or go together. `measured_rel_l2` is that of the converted model, `floor_rel_l2` what FP32 owes
    by its own rounding. They rest on `vectors` random projections, from `seed`. `left_out` names
    the outputs that are not in it: no gradient reaches them, as with integers, or they are zero.
    `doubts` say why shares may mislead; then the first nodes were tried one at a time.
    """

    vectors: int
    seed: int
    samples: int
    outputs: tuple[str, ...]
    left_out: tuple[str, ...]
    predicted_rel_l2: float
    first_order_rel_l2: float
    measured_rel_l2: float
    floor_rel_l2: float | None
    doubts: tuple[Doubt, ...]
    nodes: tuple[NodeShare, ...]

    @property
    def additivity(self) -> float:
        """The predicted error over the measured one: 1 where first order explains everything."""
        if not self.measured_rel_l2:
            return 1.0 if not self.predicted_rel_l2 else math.inf
        return self.predicted_rel_l2 / self.measured_rel_l2

    def layers(self) -> list[LayerShare]:
        """The nodes' shares summed by layer, the largest first."""
        groups: dict[str, list[NodeShare]] = {}
        for node in self.nodes:
            groups.setdefault(node.layer, []).append(node)
        rows = [_layer(layer, members) for layer, members in groups.items()]
        return sorted(rows, key=lambda row: -row.rel_l2)

    def to_frame(self) -> pd.DataFrame:
        """One row a node, the largest share first."""
        import pandas as pd

        columns = list(NodeShare.__dataclass_fields__)
        return pd.DataFrame([asdict(node) for node in self.nodes], columns=columns)


def _layer(layer: str, members: list[NodeShare]) -> LayerShare:
    first = max(members, key=lambda member: member.rel_l2)
    floors = [member.floor_rel_l2 for member in members if member.floor_rel_l2 is not None]
    return LayerShare(
        layer=layer,
        node=first.node,
        op=first.op,
        rel_l2=root_of_squares(member.rel_l2 for member in members),
        share=sum(member.share for member in members),
        floor_rel_l2=root_of_squares(floors) if floors else None,
    )


def root_of_squares(values: Iterable[float]) -> float:
    """The root of the sum of squares; infinite where a value is, and never NaN."""
    total = sum(value * value for value in values)
    return math.sqrt(total) if not math.isnan(total) else math.inf
