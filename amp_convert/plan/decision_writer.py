"""What planning settled about one graph -> its `Decision`s and cast counts, written out for a plan.

Nothing is decided here, but what follows from the dtypes: which mask values are clamped, and which
nodes count as low.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Region, Value
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import FULL, castable, name_of
from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.coloring import Painted
from amp_convert.plan.costs import Casts
from amp_convert.plan.dtype_flow import Flow, tensor_arguments
from amp_convert.plan.evidence import Evidence
from amp_convert.plan.node_context import Sites
from amp_convert.plan.plan import Decision, DecisionKind, PlannedInput, RewriteKind
from amp_convert.plan.rescaling import UNSCALED, Scaling
from amp_convert.plan.rulings import NOTHING, Ruling
from amp_convert.rules.rule_set import Category, Painting


@dataclass(frozen=True)
class Settled:
    """What planning settled, by FX name. `index` numbers the nodes that there was something to
    decide about, as `painted` does."""

    rulings: Mapping[str, Ruling]
    index: Mapping[str, int]
    painted: Painted
    scalings: Mapping[str, Scaling]
    sites: Sites
    flows: Mapping[str, Flow]


class Writer:
    """Writes down what was settled for the graph of `region` in `mode`."""

    def __init__(
        self,
        region: Region,
        mode: Mode,
        settled: Settled,
        evidence: Evidence,
        painting: Painting,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._settled, self._evidence, self._painting = settled, evidence, painting
        self._dtype, self._device = dtype, device
        self._graph = region.graphs[mode].graph_module.graph
        self._infos = region.graphs[mode].nodes
        self._values, self._macs = region.traces[mode].values, region.traces[mode].macs
        self._calls = [n for n in self._graph.nodes if n.op == "call_function"]
        self._names = {i: name for name, i in settled.index.items()}

    def decisions(self) -> list[Decision]:
        """One decision a call, in the graph's order."""
        return [self._decision(node) for node in self._calls]

    def _decision(self, node: fx.Node) -> Decision:
        info, flow = self._infos[node.name], self._settled.flows[node.name]
        outputs = tuple(
            name_of(dtype) if dtype is not None else None
            for dtype in pytree.tree_leaves(flow.result)
            if dtype is None or isinstance(dtype, torch.dtype)
        )
        owner = node
        while owner.target is operator.getitem:
            owner = owner.args[0]  # type: ignore[assignment]
        ruling = self._settled.rulings.get(owner.name, NOTHING) if node is owner else NOTHING
        decided = ruling is not NOTHING
        kind, reason, follows = self._settle(node, ruling)
        clamp = self._clamp(node, flow)
        scaling = self._settled.scalings.get(node.name, UNSCALED)
        rewrites = [RewriteKind.CLAMP_MASKS] if clamp is not None else []
        if scaling.rewrite is not None:
            rewrites.append(scaling.rewrite)
        return Decision(
            node=info.identity,
            name=node.name,
            layer=info.layer,
            module=info.modules[0] if info.modules else "",
            op=info.short_op,
            location=info.location,
            kind=kind,
            category=ruling.category,
            precision=self._precision(node, ruling, flow) if decided else "",
            dtype=next((name for name in outputs if name), ""),
            rule=ruling.rule,
            reason=reason,
            source=ruling.source,
            evidence=ruling.evidence or (self._evidence.text(node) if decided else ""),
            macs=self._macs.get(node.name, 0),
            inputs=tuple(self._inputs(node, flow, scaling)),
            output_dtype=name_of(flow.output) if flow.output is not None else None,
            output_dtypes=outputs,
            guard=ruling.guard,
            measured=ruling.measured,
            limit=ruling.limit,
            rewrites=tuple(rewrites),
            clamp=clamp,
            scale=scaling.result,
            number_scale=scaling.number,
            follows=follows,
        )

    def _inputs(self, node: fx.Node, flow: Flow, scaling: Scaling) -> Iterator[PlannedInput]:
        arguments = tensor_arguments(node, self._values)
        for index, ((name, _), dtype) in enumerate(zip(arguments, flow.inputs, strict=True)):
            wanted = name_of(dtype) if dtype is not None else None
            yield PlannedInput(name, wanted, scaling.operands.get(index, 1.0))

    def _precision(self, node: fx.Node, ruling: Ruling, flow: Flow) -> str:
        """The number format that a decided node computes in. One whose results the model has in
        the low dtype already was not converted."""
        low_name = name_of(self._dtype)
        originals = pytree.tree_leaves(self._values[node.name])
        was_low = all(isinstance(v, Value) and name_of(v.dtype) == low_name for v in originals)
        return low_name if not was_low and self._is_low(node, ruling, flow) else FULL

    def _clamp(self, node: fx.Node, flow: Flow) -> float | None:
        """What a low node's mask values are raised to: half of the lowest number, so that a score
        may be added. The exponential of either is zero."""
        if node.name not in self._settled.index or self._dtype not in flow.computes:
            return None
        site, largest = self._settled.sites.of(node), torch.finfo(self._dtype).max
        masks = [o.range for o in site.operands if o.mask] + [site.result] * site.masked
        lowest = [-r.abs_max for r in masks if r is not None and r.abs_max > r.maximum]
        if site.masked:
            lowest += site.scalars.values()
        return -largest / 2 if any(value < -largest for value in lowest) else None

    def _is_low(self, node: fx.Node, ruling: Ruling, flow: Flow) -> bool:
        """Whether a decided node delivers a low result, or reads nothing but low values where the
        FP32 model reads FP32: a comparison, or a sum with an FP64 value."""
        results = pytree.tree_leaves(flow.result)
        if self._dtype in results or ruling.explicit:
            return self._dtype in results
        kept = facts_of_target(node.target).kept_arguments(self._device)
        arguments = tensor_arguments(node, self._values)
        read = {
            dtype
            for (name, producer), dtype in zip(arguments, flow.computes, strict=True)
            if name not in kept and self._values[producer.name].dtype == torch.float32
        }
        return read == {self._dtype}

    def _settle(self, node: fx.Node, ruling: Ruling) -> tuple[DecisionKind, str, str]:
        """What had the last word; the reason: the rule's and, where painting decided, what painting
        did; and the node that it follows, if it is one."""
        painted = ruling.category in (Category.INFER, Category.CLEAR) and not ruling.pinned
        if ruling.explicit or not painted or self._painting is Painting.AUTOCAST:
            return ruling.kind, ruling.reason, ""
        index = self._settled.index[node.name]
        if index in self._settled.painted.low:
            joins = "joins the low-precision ops around it"
            return DecisionKind.PAINTING, f"{ruling.reason}; {joins}", ""
        if index in self._settled.painted.denied:
            root = self._infos[self._names[self._settled.painted.denied[index]]]
            where = f" in {root.layer}" if root.layer else ""
            follows = f"follows {root.short_op}{where}, which stays in FP32"
            return DecisionKind.PROPAGATION, f"{ruling.reason}; {follows}", root.identity
        alone = "not between two low-precision ops, so a cast would gain nothing"
        return DecisionKind.PAINTING, f"{ruling.reason}; {alone}", ""

    def casts(self) -> Casts:
        """Distinct (value, dtype) pairs and border edges, the graph's outputs included."""
        pairs: set[tuple[str, torch.dtype]] = set()
        borders = 0
        for node in self._calls:
            flow = self._settled.flows[node.name]
            arguments = tensor_arguments(node, self._values)
            for (_, producer), dtype in zip(arguments, flow.inputs, strict=True):
                if dtype is not None:
                    pairs.add((producer.name, dtype))
                    borders += 1
            if flow.output is not None:
                pairs.add((f"{node.name} result", flow.output))
                borders += 1
        for output in self._graph.find_nodes(op="output")[0].all_input_nodes:
            original = self._values[output.name]
            if isinstance(original, Value) and castable(original.dtype):
                flow_now = self._settled.flows.get(output.name)
                if flow_now is not None and flow_now.result != original.dtype:
                    pairs.add((output.name, original.dtype))
                    borders += 1
        placeholders = self._graph.find_nodes(op="placeholder")
        names = {node.name for node in placeholders if self._evidence.weight(node)}
        weights = sum(name in names for name, _ in pairs)
        return Casts(len(pairs) - weights, weights, borders)
