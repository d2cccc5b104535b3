"""The node-by-node part of an `OnnxParity`: sums over batches, by FX node, and the rows made of
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from amp_convert.core.number_formats import LOW_DTYPES, name_of, ulp_at
from amp_convert.core.tensor_errors import ErrorSums, RoundingSums
from amp_convert.onnx_file.labels import FX_KEY
from amp_convert.rewrite.insert_casts import Rewritten
from amp_convert.validate.onnx.lockstep import OnnxNodeValues
from amp_convert.validate.onnx.node_kernels import is_low
from amp_convert.validate.onnx.results import OnnxNode
from amp_convert.validate.onnx.sessions import Placement

if TYPE_CHECKING:
    import onnx_ir as ir

FP32_SLACK = 2.0**-16
"""What a node in FP32 may be off, relative to its largest magnitude: sums in another order."""
CANCELLED_SLACK = 2.0**-22
"""The same relative to what it was made of, where little of that is left: the mean of a normalised
row is nothing but rounding."""

_DRAWS = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
}  # fmt: skip
_SEVERITY = ("", "as written", "rewritten", "in float32")


@dataclass
class _Sums:
    """One FX node's; `has_local` is False where it became no ONNX node."""

    dtype: torch.dtype
    accumulated: ErrorSums
    local: RoundingSums
    has_local: bool = False
    given_abs_max: float = 0.0

    def diverges(self, errors: ErrorSums) -> bool:
        """Whether such an error parts the two. NaN does."""
        if self.dtype in LOW_DTYPES:
            return not errors.max_abs <= ulp_at(self.dtype, errors.ref_abs_max)
        slack = max(FP32_SLACK * errors.ref_abs_max, CANCELLED_SLACK * self.given_abs_max)
        return not errors.max_abs <= slack


class OnnxNodeErrors:
    """Takes in what a lockstep run shows, and gives a row for each node of the plan that is in the
    frozen graph, `graph`: what depends on weights alone is not."""

    def __init__(
        self, rewritten: Rewritten, graph: fx.Graph, model: ir.Model, low: torch.dtype
    ) -> None:
        origins = ((node.name, rewritten.origins.get(node.name, "")) for node in graph.nodes)
        decisions = rewritten.decisions
        self._decisions = {name: decisions[o] for name, o in origins if o in decisions}
        self._low = low
        self._sums: dict[str, _Sums] = {}
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            self._nodes.setdefault(node.metadata_props.get(FX_KEY, ""), []).append(node)

    def visit(self, step: OnnxNodeValues) -> None:
        """Take in what one FX node gave for one batch."""
        fresh = _Sums(step.reference.dtype, ErrorSums(), RoundingSums(self._low))
        sums = self._sums.setdefault(step.name, fresh)
        _add(sums.accumulated, step.reference, step.accumulated)
        if step.local is not None:
            sums.has_local = True
            sums.given_abs_max = max(sums.given_abs_max, step.given_abs_max)
            _add(sums.local, step.reference, step.local)

    def ran(self, placements: Mapping[str, Placement]) -> dict[str, int]:
        """The file's low nodes, counted by how they are run."""
        placed = [p for nodes in self._nodes.values() for p in self._placed(nodes, placements)]
        return dict(Counter(each.ran for each in placed))

    def _placed(self, nodes: list[ir.Node], placements: Mapping[str, Placement]) -> list[Placement]:
        names = [node.name or "" for node in nodes if _is_low(node)]
        return [placements[name] for name in names if name in placements]

    def rows(self, placements: Mapping[str, Placement]) -> tuple[OnnxNode, ...]:
        """The rows, in graph order, of all nodes whose values were found."""
        found = [name for name in self._decisions if name in self._sums]
        return tuple(self._row(name, placements) for name in found)

    def unmatched(self) -> tuple[str, ...]:
        """The floating point nodes whose values were not; tuples are compared by their parts."""
        return tuple(
            decision.node
            for name, decision in self._decisions.items()
            if name not in self._sums
            and "float" in decision.dtype
            and len(decision.output_dtypes) == 1
        )

    def first_diverging(self) -> str:
        """The first node whose own doing parts the two, or "" if there is none."""
        return self._first(lambda sums: sums.local.errors)

    def first_drifting(self) -> str:
        """The first node where all that came before has parted them, or ""."""
        return self._first(lambda sums: sums.accumulated)

    def first_random(self) -> str:
        """The first node that draws random numbers, or ""; by its name in the file where it is no
        node of the plan."""
        random = {
            name: node.name or node.op_type
            for name, nodes in self._nodes.items()
            for node in nodes
            if _draws(node)
        }
        planned = (d.node for name, d in self._decisions.items() if name in random)
        return next(planned, next(iter(random.values()), ""))

    def _first(self, errors: Callable[[_Sums], ErrorSums]) -> str:
        found = ((d, self._sums[n]) for n, d in self._decisions.items() if n in self._sums)
        return next((d.node for d, sums in found if sums.diverges(errors(sums))), "")

    def _row(self, name: str, placements: Mapping[str, Placement]) -> OnnxNode:
        decision, sums, nodes = self._decisions[name], self._sums[name], self._nodes.get(name, [])
        errors, local, placed = sums.accumulated, sums.local, self._placed(nodes, placements)
        return OnnxNode(
            node=decision.node,
            layer=decision.layer,
            op=decision.op,
            dtype=name_of(sums.dtype),
            local_rel_l2=local.errors.rel_l2,
            accumulated_rel_l2=errors.rel_l2,
            sqnr_db=errors.sqnr_db,
            cosine=errors.cosine,
            max_abs_err=errors.max_abs,
            max_ulp=local.max_ulp,
            nonfinite=errors.nonfinite,
            overflow_fraction=errors.overflow_fraction,
            underflow_fraction=local.underflow_fraction,
            onnx_ops=tuple(node.op_type for node in nodes) if sums.has_local else (),
            ran=max((each.ran for each in placed), key=_SEVERITY.index, default=""),
            provider=placed[0].provider if placed else "",
            parts=sums.diverges(local.errors),
        )


def _add(sums: ErrorSums | RoundingSums, reference: torch.Tensor, value: torch.Tensor) -> None:
    if value.shape == reference.shape:
        sums.add(reference, value)
    else:
        errors = sums.errors if isinstance(sums, RoundingSums) else sums
        errors.add_incomparable(reference.numel())


def _is_low(node: ir.Node) -> bool:
    """Whether a node reads or makes a low-precision value, and is not only a cast."""
    return node.op_type != "Cast" and any(map(is_low, (*node.inputs, *node.outputs)))


def _draws(node: ir.Node) -> bool:
    """Whether a node, or one in its subgraphs, draws random numbers. A dropout that is told whether
    to train may."""
    import onnx_ir as ir

    inner = [
        each
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for each in ir.traversal.RecursiveGraphIterator(attribute.as_graph())
    ]
    return any(
        each.op_type in _DRAWS or (each.op_type == "Dropout" and len(each.inputs) > 2)
        for each in (node, *inner)
    )
