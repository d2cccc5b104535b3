"""What planning settled about one graph -> its `Decision`s and cast counts, written out for a plan.

Nothing is decided here, but what follows from the dtypes: which mask values are clamped, and which
nodes count as low.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.regions import Region, Value
from amp_convert.core.number_formats import castable, name_of
from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.coloring import Painted
from amp_convert.plan.dtype_flow import Flow, tensor_arguments
from amp_convert.plan.evidence import Evidence
from amp_convert.plan.node_context import Sites
from amp_convert.plan.plan import Casts, Decision
from amp_convert.plan.rescaling import UNSCALED, Scaling
from amp_convert.rules.rule_set import Category, Painting


@dataclass(frozen=True)
class Ruling:
    """Why a node is what it is: the rule that gave its category, or what overruled it."""

    category: Category | None
    rule: str
    reason: str
    source: str
    pinned: bool = False
    explicit: bool = False
    evidence: str = ""
    # What the op is by its own rule: a pinned node still passes a denial on.
    own: Category | None = None


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


_CLAMPED = "its mask is raised into range (rewrite clamp_masks)"


class Writer:
    """Writes down what was settled for the graph of `region` in `mode`."""

    def __init__(
        self,
        region: Region,
        mode: str,
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
        low_name = name_of(self._dtype)
        owner = node
        while owner.target is operator.getitem:
            owner = owner.args[0]  # type: ignore[assignment]
        ruling = self._settled.rulings.get(owner.name)
        category, rule, reason, source, evidence = "none", "", "", "", ""
        if ruling is not None and node is owner:
            category = ruling.category.value if ruling.category is not None else "unknown"
            rule, source = ruling.rule, ruling.source
            reason = self._reason(node, ruling)
            evidence = ruling.evidence or self._evidence.text(node)
        clamp = self._clamp(node, flow)
        rewrites = [_CLAMPED] if clamp is not None else []
        scaling = self._settled.scalings.get(node.name, UNSCALED)
        if scaling != UNSCALED:
            how = f"its result is held times {scaling.result:g}"
            if scaling.result == 1:
                how = "it takes the factor of what it reads back"
            rewrites.append(f"{how} (rewrite {scaling.rewrite})")
        rewrite = "; ".join(rewrites)
        originals = pytree.tree_leaves(self._values[node.name])
        was_low = all(isinstance(v, Value) and name_of(v.dtype) == low_name for v in originals)
        return Decision(
            node=info.identity,
            name=node.name,
            layer=info.layer,
            module=info.modules[0] if info.modules else "",
            op=info.short_op,
            location=info.location,
            category=category,
            dtype=next((name for name in outputs if name), ""),
            rule=rule,
            reason=f"{reason}; {rewrite}" if rewrite else reason,
            source=source,
            evidence=evidence,
            low=ruling is not None
            and node is owner
            and not was_low
            and self._is_low(node, ruling, flow),
            macs=self._macs.get(node.name, 0),
            input_dtypes=tuple(name_of(d) if d is not None else None for d in flow.inputs),
            output_dtype=name_of(flow.output) if flow.output is not None else None,
            output_dtypes=outputs,
            rewrite=rewrite,
            clamp=clamp,
            scale=scaling.result,
            input_scales=tuple(scaling.operands.get(i, 1.0) for i in range(len(flow.inputs)))
            if scaling.operands
            else (),
            number_scale=scaling.number,
        )

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

    def _reason(self, node: fx.Node, ruling: Ruling) -> str:
        """The rule's reason and, where painting had the last word, what painting did."""
        if ruling.pinned or ruling.explicit or ruling.category is None:
            return ruling.reason
        if self._painting is Painting.AUTOCAST:
            return ruling.reason
        if ruling.category in (Category.ALLOW, Category.DENY):
            return ruling.reason
        index = self._settled.index[node.name]
        if index in self._settled.painted.low:
            return f"{ruling.reason}; joins the low-precision ops around it"
        if index in self._settled.painted.denied:
            root = self._infos[self._names[self._settled.painted.denied[index]]]
            where = f" in {root.layer}" if root.layer else ""
            return f"{ruling.reason}; follows {root.short_op}{where}, which stays in FP32"
        return f"{ruling.reason}; not between two low-precision ops, so a cast would gain nothing"

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
