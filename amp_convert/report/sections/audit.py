"""The audit: which layers stay FP32 and why, without converting anything.

A row is one layer, with those that differ from it only in a number, and its causes: each is one
rule and reason, with the nodes that it keeps in FP32; those that only follow another node are one
cause for each operator and layer that they follow. audit.csv has a line a layer and reason instead,
with what was measured there. Nodes that there was nothing to decide about (no floating point
tensor) are in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from amp_convert.capture.captured import Uncaptured
from amp_convert.plan.costs import Island, StoredTwice
from amp_convert.plan.plan import DecisionKind, Plan
from amp_convert.report import text as fmt
from amp_convert.report.model import ModelInfo, Section
from amp_convert.report.records import NodeRecord
from amp_convert.report.sections.grouping import (
    Cause,
    cause_of,
    layer_range,
    pattern_of,
    stays_fp32,
)


@dataclass(frozen=True)
class AuditRow:
    """Nodes of one layer that stay FP32 for one reason.

    `module` is the class of the layer, `ops` its operators with their counts, `macs_share` the
    fraction of the model's multiply-adds, `dtype` that of the nodes' results, `source` the line of
    the rules file, `location` the line of the user's file, `kind` what had the last word.
    """

    layer: str
    module: str
    ops: tuple[tuple[str, int], ...]
    nodes: int
    macs_share: float
    dtype: str
    rule: str
    reason: str
    evidence: str
    source: str
    location: str
    kind: DecisionKind


@dataclass(frozen=True)
class AuditCause:
    """Why nodes of some layers stay FP32. `ops` are their operators with counts; `evidence` is what
    was measured where a guard decided, in the first layer; `kind` is what had the last word; `here`
    says of what follows another node whether that is in the same layer."""

    kind: DecisionKind
    ops: tuple[tuple[str, int], ...]
    reason: str
    rule: str
    source: str
    evidence: str = ""
    here: bool = False


@dataclass(frozen=True)
class AuditLayers:
    """Layers that differ only in a number, with nodes that stay FP32: `layer` names them all, as in
    "model.layers.0 to 23.mlp", `layers` counts them. `module` is the class of the first,
    `location` the line of the user's file that its first node comes from, `macs_share` the fraction
    of the model's multiply-adds."""

    layer: str
    layers: int
    module: str
    location: str
    nodes: int
    macs_share: float
    causes: tuple[AuditCause, ...]


class AuditTotals(Section):
    """What the plan adds up to; shares are fractions of 1."""

    nodes: int
    fp32_nodes: int
    layers: int
    fp32_layers: int
    share_nodes_low: float
    share_macs_low: float
    casts: int
    borders: int


class AuditReport(Section):
    """The whole audit, as `amp-convert audit --json` prints it."""

    schema_version: Literal[2] = 2
    amp_convert: str
    model: ModelInfo
    dtype: str
    device: str
    rules: tuple[str, ...]
    totals: AuditTotals
    rows: tuple[AuditLayers, ...]
    unknown_ops: dict[str, int]
    uncaptured: tuple[Uncaptured, ...]
    unmatched_rules: tuple[str, ...]
    islands: tuple[Island, ...] = ()
    stored_twice: tuple[StoredTwice, ...] = ()


def audit_report(plan: Plan, model: ModelInfo, version: str) -> AuditReport:
    """The audit of `plan`; `version` is amp-convert's."""
    records = [NodeRecord.of(decision) for decision in plan.eval]
    decided = [record for record in records if record.decided]
    kept = [decision for decision in decided if stays_fp32(decision)]
    return AuditReport(
        amp_convert=version,
        model=model,
        dtype=plan.dtype,
        device=plan.device,
        rules=plan.rules,
        totals=AuditTotals(
            nodes=len(decided),
            fp32_nodes=len(kept),
            layers=len({decision.layer for decision in decided}),
            fp32_layers=len({decision.layer for decision in kept}),
            share_nodes_low=plan.share_nodes_low(),
            share_macs_low=plan.share_macs_low(),
            casts=plan.eval_casts.activations + plan.eval_casts.weights,
            borders=plan.eval_casts.borders,
        ),
        rows=tuple(audit_layers(plan)),
        unknown_ops=plan.unknown_ops(),
        uncaptured=plan.uncaptured,
        unmatched_rules=plan.unmatched_rules,
        islands=plan.islands,
        stored_twice=plan.stored_twice,
    )


def audit_rows(plan: Plan) -> list[AuditRow]:
    """The rows, in the order in which the layers run."""
    total = sum(decision.macs for decision in plan.eval)
    groups: dict[tuple[str, ...], list[NodeRecord]] = {}
    for decision in map(NodeRecord.of, plan.eval):
        if stays_fp32(decision):
            key = (decision.layer, decision.rule, decision.reason, decision.evidence)
            groups.setdefault(key, []).append(decision)
    return [_row(members, total) for members in groups.values()]


def _row(members: list[NodeRecord], total_macs: int) -> AuditRow:
    first = members[0]
    macs = sum(member.macs for member in members)
    return AuditRow(
        layer=first.layer,
        module=first.module,
        ops=tuple(Counter(member.op for member in members).most_common()),
        nodes=len(members),
        macs_share=macs / total_macs if total_macs else 0.0,
        dtype=", ".join(dict.fromkeys(member.dtype for member in members)),
        rule=first.rule,
        reason=first.reason,
        evidence=first.evidence,
        source=first.source,
        location=first.location,
        kind=first.kind,
    )


def audit_layers(plan: Plan) -> list[AuditLayers]:
    """The same by layers that differ only in a number."""
    total = sum(decision.macs for decision in plan.eval)
    records = [NodeRecord.of(decision) for decision in plan.eval]
    by_node = {record.node: record for record in records}
    groups: dict[str, list[NodeRecord]] = {}
    for record in filter(stays_fp32, records):
        groups.setdefault(pattern_of(record.layer), []).append(record)
    return [_layers(members, by_node, total) for members in groups.values()]


def _layers(
    members: list[NodeRecord], by_node: Mapping[str, NodeRecord], total_macs: int
) -> AuditLayers:
    first = members[0]
    layers = list(dict.fromkeys(member.layer for member in members))
    macs = sum(member.macs for member in members)
    groups: dict[Cause, list[NodeRecord]] = {}
    for member in members:
        groups.setdefault(cause_of(member, by_node), []).append(member)
    return AuditLayers(
        layer=layer_range(layers),
        layers=len(layers),
        module=first.module,
        location=next((member.location for member in members if member.location), ""),
        nodes=len(members),
        macs_share=macs / total_macs if total_macs else 0.0,
        causes=tuple(_cause(cause, found) for cause, found in groups.items()),
    )


def _cause(cause: Cause, members: list[NodeRecord]) -> AuditCause:
    first = members[0]
    return AuditCause(
        kind=cause.kind,
        ops=tuple(Counter(member.op for member in members).most_common()),
        reason=cause.reason,
        rule=cause.rule,
        source=cause.source,
        evidence=first.evidence if cause.kind is DecisionKind.GUARD else "",
        here=cause.layer == pattern_of(first.layer),
    )


def totals_text(report: AuditReport) -> str:
    """One sentence: how much of the model stays FP32."""
    totals = report.totals
    if not totals.fp32_nodes:
        nodes = f"{fmt.count(totals.nodes, 'node')} in {fmt.count(totals.layers, 'layer')}"
        return f"No node stays FP32 ({nodes})"
    return (
        f"{totals.fp32_nodes:,} of {fmt.count(totals.nodes, 'node')} in {totals.fp32_layers:,}"
        f" of {fmt.count(totals.layers, 'layer')} stay FP32,"
        f" with {fmt.percent(sum(row.macs_share for row in report.rows))} of the multiply-adds"
    )
