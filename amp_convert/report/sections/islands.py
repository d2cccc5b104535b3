"""What each FP32 island costs: islands that have one reason, in layers that differ in an index, are
one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from amp_convert.plan.costs import Island, StoredTwice
from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import LayerPattern, layer_patterns, pattern_of

LEAD = (
    "What each region that stays FP32 among low operators asks of one call on the example inputs: "
    "casts of activations at its borders, the bytes that they read and write, and what its results "
    "take up more than they would in low precision."
)
TWICE = "Weights that a frozen model holds in FP32 and in low precision, since it reads both:"


@dataclass(frozen=True)
class IslandRow:
    """Islands of one kind, added up; `islands` says how many."""

    islands: int
    layers: tuple[LayerPattern, ...]
    keeper: str
    ops: tuple[tuple[str, int], ...]
    reason: str
    evidence: str
    nodes: int
    casts: int
    cast_bytes: int
    wider_bytes: int


def island_rows(islands: Iterable[Island], most: int = 20) -> list[IslandRow]:
    """The rows, the dearest first, no more than `most`."""
    groups: dict[tuple[str, str, str], list[Island]] = {}
    for island in islands:
        key = (pattern_of(island.layer), island.op, island.reason)
        groups.setdefault(key, []).append(island)
    rows = [_row(members) for members in groups.values()]
    return sorted(rows, key=lambda row: -(row.cast_bytes + row.wider_bytes))[:most]


def _row(members: list[Island]) -> IslandRow:
    ops: Counter[str] = Counter()
    for member in members:
        ops.update(dict(member.ops))
    first = members[0]
    return IslandRow(
        islands=len(members),
        layers=tuple(layer_patterns(member.layer for member in members)),
        keeper=first.op,
        ops=tuple(ops.most_common()),
        reason=first.reason,
        evidence=first.evidence,
        nodes=sum(member.nodes for member in members),
        casts=sum(member.casts for member in members),
        cast_bytes=sum(member.cast_bytes for member in members),
        wider_bytes=sum(member.wider_bytes for member in members),
    )


def twice_text(weight: StoredTwice) -> str:
    """What holding a weight twice costs, and why it is."""
    why = f"{weight.reason} ({weight.evidence})" if weight.evidence else weight.reason
    return f"{weight.weight}: {fmt.size(weight.low_bytes)} more; {weight.reader} reads FP32: {why}"
