"""How far a mixed graph's nodes are from the FP32 graph's: sums over batches, a node at a time.

Each node gets two errors. The local one is the node's own doing: it is fed the reference's values.
The accumulated one is what has built up to there: it is fed the mixed model's own values. Some rows
are known without measuring, which keeps validation within a few forward passes:

1. A node with the FP32 dtypes of the original has a local error of 0: it is the same operator on
   the same values.
2. A view, or access to the only result of a tuple, moves no number: its local error is 0, and its
   accumulated error is that of its source.

A node whose mask is clamped is compared with what the clamp makes of the reference: -1e9 that
became -32752 is no error, since a softmax makes 0 of either. A value that is held times a power of
two is compared with the reference times that.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Region
from amp_convert.capture.export import CapturedGraph
from amp_convert.capture.graph_signature import Source
from amp_convert.core import choices
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.op_facts import Family, facts_of, facts_of_target
from amp_convert.core.progress import OnNode, unwatched
from amp_convert.core.tensor_errors import ErrorSums, RoundingSums
from amp_convert.plan.plan import Decision
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.insert_casts import held
from amp_convert.validate.inference import lockstep
from amp_convert.validate.inference.results import NodeDivergence


@dataclass
class _NodeSums:
    accumulated: ErrorSums = field(default_factory=ErrorSums)
    local: RoundingSums | None = None
    choices: int = 0
    changed: int = 0


class NodeErrors:
    """The sums of one region's nodes, by FX name."""

    def __init__(self, converted: ConvertedModel, region: Region, low: torch.dtype) -> None:
        self._rewritten = converted.rewritten[region.path][Mode.EVAL]
        graph = region.graphs[Mode.EVAL]
        decisions = {d.node: d for d in converted.plan.eval}
        self._decisions = {n: decisions[info.identity] for n, info in graph.nodes.items()}
        self._low, self._device = low, converted.captured.device
        self._sums: dict[str, _NodeSums] = defaultdict(_NodeSums)
        self.visited: set[str] = set()
        self._constant = _constant(graph)
        values = region.traces[Mode.EVAL].values
        self._source = {
            node.name: source.name
            for node in graph.graph_module.graph.nodes
            if node.name in self._decisions
            and (source := _unchanged_source(node, values, self._decisions)) is not None
        }

    def run(
        self, reference: Sequence[Any], mixed: Sequence[Any], on_node: OnNode = unwatched
    ) -> tuple[Any, Any]:
        nodes = len(self._decisions)
        visited = itertools.count(1)

        def visit(step: lockstep.NodeValues) -> None:
            self._visit(step)
            on_node(min(next(visited), nodes), nodes)

        return lockstep.run(
            self._rewritten, reference, mixed, visit, self._wants_local, self._device
        )

    def _wants_local(self, node: fx.Node) -> bool:
        return self._decisions[node.name].low and node.name not in self._source

    def _visit(self, step: lockstep.NodeValues) -> None:
        name = step.node.name
        tensors = [t for t in pytree.tree_leaves(step.reference) if isinstance(t, torch.Tensor)]
        # The empty cache of a decoder has no element for any input. Other values may get some.
        if name in self._constant or any(tensor.numel() for tensor in tensors):
            self.visited.add(self._decisions[name].node)
        if name in self._source or facts_of(self._decisions[name].op).is_a(Family.UNWRITTEN):
            return  # what was not written yet holds no value
        sums = self._sums[name]
        if step.ranked is not None:
            sums.changed += choices.changed(
                step.node, step.ranked, step.reference, step.accumulated
            )
            sums.choices += sum(index.numel() for index in choices.indices(step.reference))
        reference, mixed = _float_leaves(step.reference), _float_leaves(step.accumulated)
        reference = [held(tensor, self._decisions[name]) for tensor in reference]
        if [t.shape for t in reference] != [t.shape for t in mixed]:
            # A selection by value can do this; there is nothing to subtract.
            sums.accumulated.add_incomparable(sum(t.numel() for t in reference))
            return
        for want, have in zip(reference, mixed, strict=True):
            sums.accumulated.add(want, have)
        if step.local is not None:
            sums.local = sums.local or RoundingSums(self._low)
            for want, have in zip(reference, _float_leaves(step.local), strict=True):
                sums.local.add(want, have)

    def rows(self) -> dict[str, NodeDivergence]:
        """One row a node, by stable identity."""
        return {d.node: self._row(name, d) for name, d in self._decisions.items()}

    def _row(self, name: str, decision: Decision) -> NodeDivergence:
        source = name
        while source in self._source:
            source = self._source[source]
        sums = self._sums.get(source, _NodeSums())
        errors, local = sums.accumulated, sums.local if source == name else None
        measured = errors.elements > 0
        return NodeDivergence(
            node=decision.node,
            layer=decision.layer,
            op=decision.op,
            dtype=decision.dtype,
            local_rel_l2=(local.errors.rel_l2 if local else 0.0) if measured else None,
            accumulated_rel_l2=errors.rel_l2 if measured else None,
            sqnr_db=errors.sqnr_db if measured else None,
            cosine=errors.cosine if measured else None,
            max_abs_err=errors.max_abs if measured else None,
            max_ulp=(local.max_ulp if local else 0.0) if measured else None,
            nonfinite=errors.nonfinite,
            overflow_fraction=errors.overflow_fraction if measured else None,
            underflow_fraction=(local.underflow_fraction if local else 0.0) if measured else None,
            choices_changed=sums.changed / sums.choices if sums.choices else None,
        )


def _constant(graph: CapturedGraph) -> set[str]:
    """The nodes that no input of the user's has a part in, by FX name."""
    nodes = graph.graph_module.graph
    specs = graph.signature.placeholders(nodes)
    varying = {node for node, spec in specs.items() if spec.source is Source.USER}
    for node in nodes.nodes:
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return {node.name for node in nodes.nodes if node not in varying}


def _unchanged_source(
    node: fx.Node, values: Mapping[str, Any], decisions: Mapping[str, Decision]
) -> fx.Node | None:
    """The node whose every number this one passes on, if it is such a node (rule 2)."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.name not in decisions:
        return None
    if decisions[source.name].dtype != decisions[node.name].dtype:
        return None
    if node.target is operator.getitem:
        only = len([v for v in pytree.tree_leaves(values[source.name]) if v and 0 not in v.shape])
        return source if only == 1 else None
    moves = facts_of_target(node.target).is_a(Family.SHAPE, Family.COPY)
    return source if moves else None


def _float_leaves(value: Any) -> list[torch.Tensor]:
    """The floating point results, complex ones as pairs of reals."""
    leaves = (
        torch.view_as_real(leaf.resolve_conj()) if _is_complex(leaf) else leaf
        for leaf in pytree.tree_leaves(value)
    )
    return [leaf for leaf in leaves if is_float_tensor(leaf) and leaf.numel()]


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()
