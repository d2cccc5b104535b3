"""Everything about one layer, or one node: what was decided, why, back to the cause, what it adds
to the error, what it costs, and what to write into a rules file to change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amp_convert.attribute.results import Budget, Doubt, NodeShare
from amp_convert.core.errors import UsageError
from amp_convert.core.spelling import nearest
from amp_convert.plan.plan import Decision, Plan
from amp_convert.plan.saved_plan import quoted
from amp_convert.profile.calibrate import RangeStats
from amp_convert.report.model import Unchecked
from amp_convert.validate.inference.results import LayerTime


@dataclass(frozen=True)
class Link:
    """One node on the way back from a decision to what caused it."""

    node: str
    reason: str
    source: str
    evidence: str


@dataclass(frozen=True)
class NodeExplanation:
    """One node. `abs_max` is the largest magnitude of its result in calibration, `probed` that on
    inputs unlike it, None where there is none; `inputs` are the dtypes that its tensor arguments
    are cast to, "" for no cast. `causes` lead from its own reason to the seed; `share` is its part
    of the outputs' error, None where that is not known; `rule` turns the decision round."""

    node: str
    op: str
    module: str
    location: str
    dtype: str
    category: str
    why: str
    kind: str
    causes: tuple[Link, ...]
    evidence: str
    measured: float | None
    limit: float | None
    macs: int
    inputs: tuple[str, ...]
    abs_max: float | None
    probed: float | None
    share: NodeShare | None
    rule: str


@dataclass(frozen=True)
class Explanation:
    """A layer: its nodes in the order in which they run. `time` is that of the whole layer, None
    where it was not timed; `no_budget` says why no node has a share, "" where they have."""

    layer: str
    dtype: str
    nodes: tuple[NodeExplanation, ...]
    time: LayerTime | None
    predicted_rel_l2: float | None
    measured_rel_l2: float | None
    doubts: tuple[Doubt, ...]
    no_budget: str


def explanation(
    plan: Plan,
    stats: RangeStats,
    budget: Budget | Unchecked,
    times: Sequence[LayerTime],
    *,
    layer: str | None = None,
    node: str | None = None,
) -> Explanation:
    """The page for a layer, by its path, or for a node, by its identity. Raises UsageError for one
    that the model does not have."""
    by_node = {decision.node: decision for decision in plan.eval}
    if node is not None:
        if node not in by_node:
            raise _unknown("node", node, list(by_node))
        chosen = [by_node[node]]
    else:
        chosen = [decision for decision in plan.eval if decision.layer == layer]
        if not chosen:
            raise _unknown("layer", layer or "", sorted({d.layer for d in plan.eval}))
    found = budget if isinstance(budget, Budget) else None
    shares = {share.node: share for share in found.nodes} if found else {}
    name = chosen[0].layer
    return Explanation(
        layer=name,
        dtype=plan.dtype,
        nodes=tuple(_node(decision, by_node, stats, shares) for decision in chosen),
        time=next((row for row in times if row.layer == name), None),
        predicted_rel_l2=found.predicted_rel_l2 if found else None,
        measured_rel_l2=found.measured_rel_l2 if found else None,
        doubts=found.doubts if found else (),
        no_budget=budget.reason if isinstance(budget, Unchecked) else "",
    )


def _unknown(what: str, name: str, known: list[str]) -> UsageError:
    near = nearest(name, known)
    mend = f"Did you mean {near}?" if near else "amp-convert audit lists them; the top level is ''."
    return UsageError(f"the model has no {what} {name!r}", mend=mend)


def _node(
    decision: Decision,
    by_node: Mapping[str, Decision],
    stats: RangeStats,
    shares: Mapping[str, NodeShare],
) -> NodeExplanation:
    known = stats.ranges.get(decision.node)
    return NodeExplanation(
        node=decision.node,
        op=decision.op,
        module=decision.module,
        location=decision.location,
        dtype=decision.dtype,
        category=decision.category or "",
        why=decision.why,
        kind=decision.kind,
        causes=tuple(_causes(decision, by_node)),
        evidence=decision.evidence,
        measured=decision.measured,
        limit=decision.limit,
        macs=decision.macs,
        inputs=tuple(dtype or "" for dtype in decision.input_dtypes),
        abs_max=known.abs_max if known else None,
        probed=known.probed.abs_max if known and known.probed else None,
        share=shares.get(decision.node),
        rule=_rule(decision) if decision.decided else "",
    )


def _causes(decision: Decision, by_node: Mapping[str, Decision]) -> list[Link]:
    """The nodes that a decision follows from, one after the other, to the one that follows none."""
    links: list[Link] = []
    seen = {decision.node}
    while (follows := decision.follows) and follows in by_node and follows not in seen:
        seen.add(follows)
        decision = by_node[follows]
        links.append(Link(follows, decision.reason, decision.source, decision.evidence))
    return links


def _rule(decision: Decision) -> str:
    """The rule that turns it round, for a rules file."""
    category, why = ("deny", "keep it in FP32") if decision.low else ("allow", "let it be low")
    return f'[[rule]]\nnode = {quoted(decision.node)}\ncategory = "{category}"\nreason = "{why}"'
