"""Which nodes stay FP32, grouped so that a reader sees reasons and not nodes.

Decisions are grouped by rule and reason. Within a group, layers that differ only in an index share
one pattern (`encoder.layer.*.output`), so that a hundred layers with one reason read as one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from amp_convert.plan.plan import DecisionKind
from amp_convert.report import text as fmt
from amp_convert.report.records import NodeRecord

TOP_LEVEL = "(top level)"
_INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@dataclass(frozen=True)
class LayerPattern:
    """Layers that differ only in an index: their shared pattern and how many there are."""

    pattern: str
    layers: int
    nodes: int


@dataclass(frozen=True)
class Fp32Group:
    """Nodes that stay out of low precision for one reason; `macs_share` is a fraction of 1."""

    kind: DecisionKind
    rule: str
    reason: str
    source: str
    evidence: str
    location: str
    nodes: int
    layers: tuple[LayerPattern, ...]
    ops: tuple[tuple[str, int], ...]
    macs_share: float


def layer_name(layer: str) -> str:
    """The layer as shown: printable, the top level by name."""
    return fmt.printable(layer) or TOP_LEVEL


def pattern_of(layer: str) -> str:
    """The layer's path with `*` for each index, as a rule's glob could be written."""
    return _INDEX.sub("*", layer)


def stays_fp32(decision: NodeRecord) -> bool:
    """Whether the node has a floating point tensor and does not compute in low precision."""
    return decision.decided and not decision.low


def fp32_groups(decisions: Iterable[NodeRecord]) -> list[Fp32Group]:
    """Nodes that stay FP32 by rule and reason, by multiply-adds and then by count."""
    decisions = tuple(decisions)
    total = sum(decision.macs for decision in decisions)
    groups: dict[tuple[str, str], list[NodeRecord]] = {}
    for decision in decisions:
        if stays_fp32(decision):
            groups.setdefault((decision.rule, decision.reason), []).append(decision)
    found = [_group(members, total) for members in groups.values()]
    return sorted(found, key=lambda group: (-group.macs_share, -group.nodes))


def _group(members: Sequence[NodeRecord], total_macs: int) -> Fp32Group:
    first = next((member for member in members if member.evidence), members[0])
    macs = sum(member.macs for member in members)
    return Fp32Group(
        kind=first.kind,
        rule=first.rule,
        reason=first.reason,
        source=first.source,
        evidence=first.evidence,
        location=first.location,
        nodes=len(members),
        layers=tuple(layer_patterns(member.layer for member in members)),
        ops=tuple(Counter(member.op for member in members).most_common()),
        macs_share=macs / total_macs if total_macs else 0.0,
    )


def layer_patterns(layers: Iterable[str]) -> list[LayerPattern]:
    """The layers of nodes, those that differ only in an index merged, most nodes first."""
    nodes = Counter(layers)
    merged: dict[str, list[str]] = {}
    for layer in nodes:
        merged.setdefault(pattern_of(layer), []).append(layer)
    found = [
        LayerPattern(
            layer_name(pattern if len(members) > 1 else members[0]),
            len(members),
            sum(nodes[member] for member in members),
        )
        for pattern, members in merged.items()
    ]
    return sorted(found, key=lambda pattern: -pattern.nodes)


def layers_text(patterns: Sequence[LayerPattern], limit: int = 2) -> str:
    """ "encoder.layer.*.output (12 layers), pooler and 3 more"."""
    shown = [
        fmt.tail(pattern.pattern, 60)
        + (f" ({pattern.layers} layers)" if pattern.layers > 1 else "")
        for pattern in patterns[:limit]
    ]
    rest = sum(pattern.layers for pattern in patterns[limit:])
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def ops_text(ops: Sequence[tuple[str, int]], limit: int = 3) -> str:
    """ "aten.mean, aten.pow ×12 and 3 more ops"."""
    shown = [
        fmt.clip(fmt.printable(op), 64) + (f" ×{number}" if number > 1 else "")
        for op, number in ops[:limit]
    ]
    rest = len(ops) - limit
    return ", ".join(shown) + (f" and {fmt.count(rest, 'more op')}" if rest > 0 else "")
