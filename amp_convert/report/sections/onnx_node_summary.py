"""The nodes of an ONNX file that a reader should look at: where it parts from PyTorch, and how far.

Nodes are joined with the plan's decisions by their identity, which gives the user's file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from amp_convert.report.records import NodeRecord
from amp_convert.report.sections.grouping import ops_text
from amp_convert.report.sections.summary import severity
from amp_convert.validate.onnx.results import OnnxNode, OnnxParity

NODES_TEXT = (
    "Relative L2 error against the same node of the converted PyTorch model. Local: the node given "
    "PyTorch's values; accumulated: given those of the ONNX nodes before it"
)
FIRSTS_TEXT = (
    "A node parts where its local result is further from PyTorch's than one ULP at its largest "
    "magnitude (in float32: 2⁻¹⁶ of that), and drifts where its accumulated one is. Between two "
    "nodes that it runs in float32 ONNX Runtime leaves out the casts, so from the first of these "
    "on results may stay unrounded"
)
MAX_NODES = 8
_MAX_OPS = 5


@dataclass(frozen=True)
class NodeRow:
    """One FX node, the ONNX operators that it became, and where it stands in the user's files."""

    layer: str
    op: str
    dtype: str
    location: str
    onnx_ops: str
    ran: str
    local: float | None
    accumulated: float | None
    parts: bool


@dataclass(frozen=True)
class FirstNode:
    """The first node of a kind in graph order; without one, `text` says that there is none, or why
    that is not known."""

    title: str
    node: NodeRow | None
    text: str


def node_rows(parity: OnnxParity, decisions: Iterable[NodeRecord]) -> dict[str, NodeRow]:
    """The rows of all nodes that were compared, by identity, in graph order."""
    locations = {decision.node: decision.location for decision in decisions}
    return {node.node: _row(node, locations) for node in parity.nodes}


def _row(node: OnnxNode, locations: Mapping[str, str]) -> NodeRow:
    return NodeRow(
        layer=node.layer,
        op=node.op,
        dtype=node.dtype,
        location=locations.get(node.node, ""),
        onnx_ops=ops_text(tuple(Counter(node.onnx_ops).items()), _MAX_OPS),
        ran=node.ran,
        local=node.local_rel_l2,
        accumulated=node.accumulated_rel_l2,
        parts=node.parts,
    )


def first_nodes(parity: OnnxParity, rows: Mapping[str, NodeRow]) -> tuple[FirstNode, ...]:
    """The first node that parts, that drifts, and that ONNX Runtime runs in FP32."""
    stepwise = parity.run("node by node").failure

    def first(title: str, identity: str, failure: str) -> FirstNode:
        node = rows.get(identity) if identity else None
        unknown = f"not known: {failure}" if failure else "none"
        return FirstNode(title, node, "" if node else identity or unknown)

    ran = "" if parity.ran else parity.ran_reason
    return (
        first("first to part", parity.parting, stepwise),
        first("first to drift", parity.drifting, stepwise),
        first("first in float32", parity.unrounded, ran or stepwise),
    )


def worst_nodes(rows: Iterable[NodeRow]) -> tuple[NodeRow, ...]:
    """The nodes of largest local error, worst first, NaN before all others."""
    ranked = sorted(rows, key=lambda row: -severity(row.local))
    return tuple(row for row in ranked if severity(row.local) > 0)[:MAX_NODES]
