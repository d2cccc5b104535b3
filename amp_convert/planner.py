"""Captured + Rules + RangeStats -> `Plan`: a precision and a reason for every node. Pure.

For each graph of each region:

1. A node without an FP32 input has nothing to decide. A `.to()` in the model's own code stays as it
   is, and what comes after a `.to(float32)` counts as following a denied node.
2. Every other node gets a category: from the user's override of its node, layer or module, else
   from its op's rule, else none ("unknown"): such a node stays FP32 and is counted. An override to
   allow or deny pins the node itself; it does not flood.
3. The graph is painted (see `painting`) or, with `painting = "autocast"`, each node judged alone.
4. Guards look at the nodes that came out low (see `guards`). Those that fire, and those whose
   kernel refuses the low dtype, are pinned to FP32, and the graph is painted again until nothing
   changes.
5. Dtypes are propagated (see `propagate`), which fixes each cast.

Nothing here touches a graph, and equal inputs give equal plans.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert import guards as guarding
from amp_convert.capture import Captured, Region, Value
from amp_convert.dtypes import castable, name_of
from amp_convert.export import NodeInfo
from amp_convert.kernels import casts_result, kept_arguments
from amp_convert.painting import Painted, paint
from amp_convert.plan import Casts, Decision, Plan
from amp_convert.profile import Range, RangeStats, input_key
from amp_convert.propagate import (
    Flow,
    NoKernelError,
    Precision,
    propagate,
    tensor_arguments,
)
from amp_convert.rounding import Growth
from amp_convert.rules import Category, Painting, Place, Rules, Target
from amp_convert.runner import InputSpec, Source, UserInput
from amp_convert.sites import Sites

_T = TypeVar("_T")

aten = torch.ops.aten


def make_plan(
    captured: Captured,
    rules: Rules,
    stats: RangeStats,
    dtype: torch.dtype,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Decide the precision of every node of every captured graph; `dtype` is the low one.

    `refused` maps operators (with overload) that turned out to have no kernel for their planned
    dtypes to what they said; they stay FP32.
    """
    decisions: dict[str, list[Decision]] = {"eval": [], "train": []}
    casts = {"eval": Casts(), "train": Casts()}
    for region in captured.regions:
        for mode in region.graphs:
            device = captured.device.type
            planner = _GraphPlanner(region, mode, rules, stats, dtype, device, refused)
            found, count = planner.plan()
            decisions[mode] += found
            casts[mode] += count
    return Plan(
        dtype=name_of(dtype),
        device=captured.device.type,
        rules=rules.files,
        painting=rules.painting.value,
        calibration_batches=stats.batches,
        eval=tuple(decisions["eval"]),
        train=tuple(decisions["train"]),
        eval_casts=casts["eval"],
        train_casts=casts["train"],
        uncaptured=captured.uncaptured,
        unmatched_rules=_unmatched(captured, rules),
    )


def _unmatched(captured: Captured, rules: Rules) -> tuple[str, ...]:
    """The user's node, layer and module rules that no node answers to: misspelt, perhaps."""
    matched = {
        index
        for region in captured.regions
        for graph in region.graphs.values()
        for info in graph.nodes.values()
        for index in rules.overrides(node=info.identity, layer=info.layer, modules=info.modules)
    }
    return tuple(
        f"{rule.name} ({rule.source})"
        for index, rule in enumerate(rules.rules)
        if rule.target is not Target.OP and not rule.preset and index not in matched
    )


@dataclass(frozen=True)
class _Verdict:
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


_UNKNOWN = _Verdict(None, "unknown op", "no rule names this op, so it stays in FP32", "")
_EXPLICIT = _Verdict(
    Category.DENY, "explicit cast", "the model's own code asks for this dtype", "model",
    explicit=True,
)  # fmt: skip
# An op rule cannot see arguments.
_ACCUMULATING = _Verdict(
    Category.DENY, "accumulating write", "it adds up values that fall on one place", "planner"
)
_CLAMPED = "its mask is raised into range (rewrite clamp_masks)"
_CASTS = (aten.to.dtype, aten._to_copy.default)
# It reads raw memory, and a cast may lay the same values out differently.
_NEVER_CAST = (aten.as_strided.default,)


class _GraphPlanner:
    """Plans one graph. `_nodes` holds the FX nodes that there is something to decide about."""

    def __init__(
        self,
        region: Region,
        mode: str,
        rules: Rules,
        stats: RangeStats,
        dtype: torch.dtype,
        device: str,
        refused: Mapping[str, str],
    ) -> None:
        self._refused = refused
        self._region, self._mode, self._rules, self._stats = region, mode, rules, stats
        self._dtype, self._device = dtype, device
        captured = region.graphs[mode]
        self._graph = captured.graph_module.graph
        self._infos: Mapping[str, NodeInfo] = captured.nodes
        self._values, self._macs = region.traces[mode].values, region.traces[mode].macs
        self._calls = [n for n in self._graph.nodes if n.op == "call_function"]
        self._sources = {
            n.name: spec
            for n, spec in zip(
                (n for n in self._graph.nodes if n.op == "placeholder"),
                captured.signature.inputs,
                strict=True,
            )
        }
        self._source_keys = _source_keys(region, self._sources, captured.signature.user_inputs)
        self._groups = _by_layer_and_op(captured.nodes.values())
        self._eval_groups = _by_layer_and_op(region.graphs["eval"].nodes.values())
        self._nodes = [n for n in self._calls if self._is_concerned(n)]
        self._index = {node.name: i for i, node in enumerate(self._nodes)}
        self._verdicts = {n.name: self._judge(n) for n in self._nodes}
        self._sites = Sites(
            self._graph, self._values, {n: i.short_op for n, i in self._infos.items()},
            self._range, self._growth, self._weight, device, stats.batches,
            masks=rules.rewrites.clamp_masks,
        )  # fmt: skip
        self._painted = Painted(frozenset(), {})

    def plan(self) -> tuple[list[Decision], Casts]:
        """Paint, guard and propagate until nothing changes; then write the decisions down."""
        while True:
            precision = self._precisions()
            if self._apply_guards(precision):
                continue
            try:
                flows = propagate(self._graph, self._values, precision, self._dtype, self._device)
            except NoKernelError as refusal:
                reason = f"it has no {name_of(self._dtype)} kernel"
                self._pin(refusal.node, "no kernel", reason, refusal.cause)
                continue
            return [self._decision(n, flows) for n in self._calls], self._casts(flows)

    # --- categories ------------------------------------------------------------------------------

    def _is_concerned(self, node: fx.Node) -> bool:
        """Whether the node makes a tensor from an FP32 tensor. What picks from a tuple goes with
        the node that made the tuple."""
        if node.target is operator.getitem or not any(
            isinstance(leaf, Value) for leaf in pytree.tree_leaves(self._values[node.name])
        ):
            return False
        return any(
            self._values[producer.name].dtype == torch.float32
            for _, producer in tensor_arguments(node, self._values)
        )

    def _judge(self, node: fx.Node) -> _Verdict:
        info = self._infos[node.name]
        place = Place(name_of(self._dtype), self._device, self._mode)
        rule = self._rules.match_override(
            place, node=info.identity, layer=info.layer, modules=info.modules
        )
        result = self._values[node.name]
        if node.target in _CASTS and isinstance(result, Value) and "dtype" in _arguments(node):
            return _EXPLICIT
        by_op = self._rules.match_op(place, info.op)
        own = by_op.category if by_op is not None else None
        if rule is None:
            rule = by_op
            if rule is not None and rule.category is Category.INFER and self._accumulates(node):
                return _ACCUMULATING
        if rule is None:
            return _UNKNOWN
        if info.op in self._refused and rule.category is not Category.DENY:
            return _Verdict(
                Category.DENY, "no kernel", f"no {place.dtype} kernel for it on {place.device}",
                "measured",
                pinned=True, evidence=self._refused[info.op], own=own,
            )  # fmt: skip
        pinned = rule.target is not Target.OP and rule.category in (Category.ALLOW, Category.DENY)
        return _Verdict(rule.category, rule.name, rule.reason, rule.source, pinned=pinned, own=own)

    def _accumulates(self, node: fx.Node) -> bool:
        """Whether the node is an `index_put` that adds to what is there: in FP16, 4096 values that
        fall on one place leave an error of 1e-2. Autocast's own painting does as autocast does."""
        if self._rules.painting is Painting.AUTOCAST or "index_put" not in str(node.target):
            return False
        return True in (*node.args[3:4], *node.kwargs.values())

    # --- painting --------------------------------------------------------------------------------

    def _precisions(self) -> dict[str, Precision]:
        if self._rules.painting is Painting.AUTOCAST:
            alone = {
                Category.ALLOW: Precision.LOW,
                Category.DENY: Precision.FULL,
                Category.INFER: Precision.WIDEST,
                Category.CLEAR: Precision.AS_IS,
                None: Precision.FULL,
            }
            return {
                name: Precision.AS_IS if verdict.explicit else alone[verdict.category]
                for name, verdict in self._verdicts.items()
            }
        index = self._index
        pinned = {n for n, v in self._verdicts.items() if v.pinned and v.category is Category.DENY}
        categories = {
            index[name]: v.own if name in pinned and v.own is not Category.ALLOW else v.category
            for name, v in self._verdicts.items()
        }
        for name in pinned:
            if self._verdicts[name].own is Category.ALLOW:
                categories[index[name]] = None
        edges = [
            (index[producer], index[node.name])
            for node in self._nodes
            for producer in self._producers(node)
            if producer in index
        ]
        self._painted = paint(categories, edges, {index[name] for name in pinned})
        precision = {}
        for node in self._nodes:
            if self._verdicts[node.name].explicit or node.target in _NEVER_CAST:
                precision[node.name] = Precision.AS_IS
            elif index[node.name] in self._painted.low:
                precision[node.name] = Precision.LOW
            else:
                precision[node.name] = Precision.ORIGINAL
        for node in self._nodes:
            # A lookup delivers low values only where nobody wants them back in FP32.
            if casts_result(node.target) and any(
                precision.get(user.name) is not Precision.LOW for user in node.users
            ):
                precision[node.name] = Precision.ORIGINAL
        return precision

    def _producers(self, node: fx.Node) -> list[str]:
        """Names of the nodes whose FP32 results this one reads, seen through tuple access."""
        found = []
        for _, producer in tensor_arguments(node, self._values):
            if self._values[producer.name].dtype == torch.float32:
                while producer.target is operator.getitem:
                    producer = producer.args[0]  # type: ignore[assignment]
                found.append(producer.name)
        return found

    # --- guards ----------------------------------------------------------------------------------

    def _apply_guards(self, precision: Mapping[str, Precision]) -> bool:
        """Pin the low nodes on which a guard fires; whether there were any."""
        fired = False
        for node in self._nodes:
            if precision[node.name] is Precision.LOW and not self._verdicts[node.name].pinned:
                finding = guarding.first_finding(
                    self._sites.of(node), self._rules.guards, self._dtype
                )
                if finding is not None:
                    fired = True
                    self._pin(node.name, f"guard {finding.guard}", finding.reason, finding.evidence)
        return fired

    def _weight(self, node: fx.Node) -> str:
        """The name of the parameter, buffer or constant that a value is; "" for any other."""
        spec = self._sources.get(node.name)
        if spec is None or spec.source is Source.USER:
            return ""
        return self._region.qualified(spec.target)

    def _range(self, node: fx.Node) -> Range | None:
        """What calibration saw of a node's result, or of a tensor that the graph is given."""
        spec = self._sources.get(node.name)
        if spec is not None:
            return self._stats.ranges.get(self._source_keys[node.name])
        return self._known(node, self._stats.ranges, Range.merged)

    def _growth(self, node: fx.Node) -> Growth | None:
        """What the trials of calibration showed of a node."""
        return self._known(node, self._stats.growths.get(self._dtype, {}), Growth.merged)

    def _known(
        self, node: fx.Node, measured: Mapping[str, _T], merged: Callable[[_T, _T], _T]
    ) -> _T | None:
        """Calibration runs the eval graph. Where the train graph has more or fewer of an operator
        in a layer, nobody knows which is which: then the worst of all of them holds for each."""
        info = self._infos.get(node.name)
        if info is None:
            return None
        group = (info.layer, info.short_op)
        if len(self._groups[group]) == len(self._eval_groups.get(group, ())):
            return measured.get(info.identity)
        seen = [measured.get(name) for name in self._eval_groups.get(group, ())]
        known = [found for found in seen if found is not None]
        return functools.reduce(merged, known) if known else None

    def _pin(self, name: str, rule: str, reason: str, evidence: str = "") -> None:
        was = self._verdicts[name]
        self._verdicts[name] = _Verdict(
            Category.DENY, rule, reason, "measured" if evidence else was.source,
            pinned=True, evidence=evidence, own=was.own,
        )  # fmt: skip

    # --- results ---------------------------------------------------------------------------------

    def _decision(self, node: fx.Node, flows: Mapping[str, Flow]) -> Decision:
        info, flow = self._infos[node.name], flows[node.name]
        outputs = tuple(
            name_of(dtype) if dtype is not None else None
            for dtype in pytree.tree_leaves(flow.result)
            if dtype is None or isinstance(dtype, torch.dtype)
        )
        low_name = name_of(self._dtype)
        owner = node
        while owner.target is operator.getitem:
            owner = owner.args[0]  # type: ignore[assignment]
        verdict = self._verdicts.get(owner.name)
        category, rule, reason, source = "none", "", "", ""
        if verdict is not None and node is owner:
            category = self._category_name(verdict)
            rule, source = verdict.rule, verdict.source
            reason = self._reason(node, verdict)
        clamp = self._clamp(node, flow)
        if clamp is not None and _CLAMPED not in reason:
            reason = f"{reason}; {_CLAMPED}"
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
            reason=reason,
            source=source,
            evidence=self._evidence(node, verdict) if category != "none" else "",
            low=verdict is not None
            and node is owner
            and not was_low
            and self._is_low(node, verdict, flow),
            macs=self._macs.get(node.name, 0),
            input_dtypes=tuple(name_of(d) if d is not None else None for d in flow.inputs),
            output_dtype=name_of(flow.output) if flow.output is not None else None,
            output_dtypes=outputs,
            clamp=clamp,
        )

    def _clamp(self, node: fx.Node, flow: Flow) -> float | None:
        """What a low node's mask values are raised to: half of the lowest number, so that a score
        may be added. The exponential of either is zero."""
        if node.name not in self._index or self._dtype not in flow.computes:
            return None
        site, largest = self._sites.of(node), torch.finfo(self._dtype).max
        masks = [o.range for o in site.operands if o.mask] + [site.result] * site.masked
        lowest = [-r.abs_max for r in masks if r is not None and r.abs_max > r.maximum]
        if site.masked:
            lowest += site.scalars.values()
        return -largest / 2 if any(value < -largest for value in lowest) else None

    def _is_low(self, node: fx.Node, verdict: _Verdict, flow: Flow) -> bool:
        """Whether a decided node delivers a low result, or reads nothing but low values where the
        FP32 model reads FP32: a comparison, or a sum with an FP64 value."""
        results = pytree.tree_leaves(flow.result)
        if self._dtype in results or verdict.explicit:
            return self._dtype in results
        kept = kept_arguments(node.target, self._device)
        arguments = tensor_arguments(node, self._values)
        read = {
            dtype
            for (name, producer), dtype in zip(arguments, flow.computes, strict=True)
            if name not in kept and self._values[producer.name].dtype == torch.float32
        }
        return read == {self._dtype}

    def _category_name(self, verdict: _Verdict) -> str:
        return verdict.category.value if verdict.category is not None else "unknown"

    def _reason(self, node: fx.Node, verdict: _Verdict) -> str:
        """The rule's reason and, where painting had the last word, what painting did."""
        if verdict.pinned or verdict.explicit or verdict.category is None:
            return verdict.reason
        if self._rules.painting is Painting.AUTOCAST:
            return verdict.reason
        if verdict.category in (Category.ALLOW, Category.DENY):
            return verdict.reason
        index = self._index[node.name]
        if index in self._painted.low:
            return f"{verdict.reason}; joins the low-precision ops around it"
        if index in self._painted.denied:
            root = self._infos[self._nodes[self._painted.denied[index]].name]
            where = f" in {root.layer}" if root.layer else ""
            return f"{verdict.reason}; follows {root.short_op}{where}, which stays in FP32"
        return f"{verdict.reason}; not between two low-precision ops, so a cast would gain nothing"

    def _evidence(self, node: fx.Node, verdict: _Verdict | None) -> str:
        if verdict is not None and verdict.evidence:
            return verdict.evidence
        if not self._stats.batches:
            return "no evidence: nothing was measured"
        seen = self._range(node)
        if seen is None:
            return "not measured"
        batches = self._stats.batches
        return f"abs max {seen.abs_max:.5g} in {batches} batch{'es' if batches > 1 else ''}"

    def _casts(self, flows: Mapping[str, Flow]) -> Casts:
        """Distinct (value, dtype) pairs and border edges, the graph's outputs included."""
        pairs: set[tuple[str, torch.dtype]] = set()
        borders = 0
        for node in self._calls:
            flow = flows[node.name]
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
                flow_now = flows.get(output.name)
                if flow_now is not None and flow_now.result != original.dtype:
                    pairs.add((output.name, original.dtype))
                    borders += 1
        weights = sum(
            name in self._sources and self._sources[name].source is not Source.USER
            for name, _ in pairs
        )
        return Casts(len(pairs) - weights, weights, borders)


def _source_keys(
    region: Region, sources: Mapping[str, InputSpec], users: Sequence[UserInput]
) -> dict[str, str]:
    """The name under which calibration kept the range of each of a graph's inputs."""
    paths = iter(users)
    return {
        name: input_key(region, next(paths).path)
        if spec.source is Source.USER
        else region.qualified(spec.target)
        for name, spec in sources.items()
    }


def _by_layer_and_op(infos: Iterable[NodeInfo]) -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for info in infos:
        groups.setdefault((info.layer, info.short_op), []).append(info.identity)
    return groups


def _arguments(node: fx.Node) -> set[str]:
    """The names of the schema arguments that a call gives."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {*names[: len(node.args)], *node.kwargs}
