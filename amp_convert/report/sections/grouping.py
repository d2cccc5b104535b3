"""Which nodes stay FP32, grouped so that a reader sees reasons and not nodes.

Decisions are grouped by rule and reason; those that only follow another node, by the operator and
the layer that they follow. Within a group, layers that differ only in an index share
one pattern (`encoder.layer.*.output`), so that a hundred layers with one reason read as one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


def layer_range(layers: Sequence[str]) -> str:
    """Layers that differ only in their numbers, as one name: "encoder.layer.0 to 11.output" where
    one number varies and none is left out, else with `*` for each number that varies."""
    first = layers[0]
    if len(layers) == 1:
        return layer_name(first)
    numbers = [[int(n) for n in _INDEX.findall(layer)] for layer in layers]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    found = sorted(row[varying[0]] for row in numbers)
    whole = len(varying) == 1 and found == list(range(found[0], found[-1] + 1))
    shown = f"{found[0]} to {found[-1]}" if whole else "*"
    place = iter(range(len(numbers[0])))
    return layer_name(_INDEX.sub(lambda m: shown if next(place) in varying else m[0], first))


def stays_fp32(decision: NodeRecord) -> bool:
    """Whether the node has a floating point tensor and does not compute in low precision."""
    return decision.decided and not decision.low


def fp32_groups(decisions: Iterable[NodeRecord]) -> list[Fp32Group]:
    """Nodes that stay FP32 by rule and reason, by multiply-adds and then by count."""
    decisions = tuple(decisions)
    total = sum(decision.macs for decision in decisions)
    by_node = {decision.node: decision for decision in decisions}
    groups: dict[Cause, list[NodeRecord]] = {}
    for decision in filter(stays_fp32, decisions):
        cause = cause_of(decision, by_node)
        groups.setdefault(replace(cause, source=""), []).append(decision)
    found = [_group(cause, members, total) for cause, members in groups.items()]
    return sorted(found, key=lambda group: (-group.macs_share, -group.nodes))


@dataclass(frozen=True)
class Cause:
    """Why a node stays FP32; `layer` is the pattern of the one that it follows, None where it
    follows none."""

    kind: DecisionKind
    rule: str
    reason: str
    source: str
    layer: str | None = None


def cause_of(record: NodeRecord, by_node: Mapping[str, NodeRecord]) -> Cause:
    """The cause, the same for nodes that follow one operator in layers that differ in an index."""
    root = by_node.get(record.follows)
    if root is None:
        return Cause(record.kind, record.rule, record.reason, record.source)
    layer = pattern_of(root.layer)
    where = f" in {layer_name(layer)}" if layer else ""
    reason = f"follows {root.op}{where}, which stays in FP32"
    return Cause(record.kind, "painting", reason, "", layer)


def _group(cause: Cause, members: Sequence[NodeRecord], total_macs: int) -> Fp32Group:
    first = next((member for member in members if member.evidence), members[0])
    macs = sum(member.macs for member in members)
    return Fp32Group(
        kind=cause.kind,
        rule=cause.rule,
        reason=cause.reason,
        source="" if cause.layer is not None else first.source,
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
