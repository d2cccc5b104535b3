"""Captured + Rules + RangeStats -> `Plan`: a precision and a reason for every node. Pure.

For each graph of each region:

1. A node without an FP32 input has nothing to decide. A `.to()` in the model's own code stays as it
   is, and what comes after a `.to(float32)` counts as following a denied node.
2. Every other node gets a category: from the user's override of its node, layer or module, else
   from its op's rule, else none ("unknown"): such a node stays FP32 and is counted. An override to
   allow or deny pins the node itself; it does not flood.
3. The graph is painted (see `coloring`) or, with `painting = "autocast"`, each node judged alone.
4. Low products that leave the range are scaled where that is possible (see `rescaling`).
5. GuardLimits look at the nodes that came out low (see `guards`). Those that fire, and those whose
   kernel refuses the low dtype, are pinned to FP32, and the graph is painted again until nothing
   changes.
6. Dtypes are propagated (see `dtype_flow`), which fixes each cast, and it is all written down (see
   `decision_writer`).

Nothing here touches a graph, and equal inputs give equal plans.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Captured, Region, Value
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import name_of
from amp_convert.core.op_facts import Family, canonical, facts_of_target
from amp_convert.core.precision import Precision
from amp_convert.plan import guards as guarding
from amp_convert.plan.batch_norm_folds import batch_norm_folds
from amp_convert.plan.coloring import Painted, paint
from amp_convert.plan.costs import Casts
from amp_convert.plan.decision_writer import Settled, Writer
from amp_convert.plan.dtype_flow import NoKernelError, propagate, tensor_arguments
from amp_convert.plan.evidence import Evidence
from amp_convert.plan.guards import Site
from amp_convert.plan.islands import islands
from amp_convert.plan.node_context import Sites
from amp_convert.plan.plan import Decision, DecisionKind, Plan
from amp_convert.plan.rescaling import UNSCALED, Rescaler, Scaling
from amp_convert.plan.rulings import Judge, Ruling, operator_rules, ruling_of
from amp_convert.plan.tied_tables import is_table_low
from amp_convert.plan.unmatched_rules import unmatched
from amp_convert.profile.calibrate import Range, RangeStats
from amp_convert.rules.rule_set import Category, Painting, Rules


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
    decisions: dict[Mode, list[Decision]] = {mode: [] for mode in Mode}
    casts = {mode: Casts() for mode in Mode}
    for region, mode in captured.graphs():
        device = captured.device.type
        planner = _GraphPlanner(region, mode, rules, stats, dtype, device, refused)
        found, count = planner.plan()
        decisions[mode] += found
        casts[mode] += count
    by_node = {d.node: d for d in decisions[Mode.EVAL]}
    folds = [f for r in captured.regions for f in batch_norm_folds(r, by_node)]
    return Plan(
        dtype=name_of(dtype),
        device=captured.device.type,
        rules=rules.files,
        painting=rules.painting.value,
        calibration_batches=stats.batches,
        eval=tuple(decisions[Mode.EVAL]),
        train=tuple(decisions[Mode.TRAIN]),
        eval_casts=casts[Mode.EVAL],
        train_casts=casts[Mode.TRAIN],
        uncaptured=captured.uncaptured,
        unmatched_rules=unmatched(captured, rules),
        eager_macs=captured.eager_macs,
        islands=islands(captured, decisions[Mode.EVAL], dtype),
        batch_norm_folds=tuple(folds),
        operators=operator_rules(rules, name_of(dtype), captured.device.type),
    )


class _GraphPlanner:
    """Plans one graph. `_nodes` holds the FX nodes that there is something to decide about."""

    def __init__(
        self,
        region: Region,
        mode: Mode,
        rules: Rules,
        stats: RangeStats,
        dtype: torch.dtype,
        device: str,
        refused: Mapping[str, str],
    ) -> None:
        self._region, self._mode, self._rules = region, mode, rules
        self._dtype, self._device = dtype, device
        captured = region.graphs[mode]
        self._graph = captured.graph_module.graph
        self._infos, self._values = captured.nodes, region.traces[mode].values
        self._evidence = Evidence(region, mode, stats, dtype)
        self._tensors = dict(
            zip(
                self._graph.find_nodes(op="placeholder"), region.runner(mode).tensors(), strict=True
            )
        )
        self._nodes = [n for n in self._graph.nodes if self._is_concerned(n)]
        self._index = {node.name: i for i, node in enumerate(self._nodes)}
        judge = Judge(rules, dtype, device, mode, refused)
        self._rulings = {
            n.name: judge.of(n, self._infos[n.name], self._values[n.name]) for n in self._nodes
        }
        self._ops = {name: canonical(info.op) for name, info in self._infos.items()}
        kinds = rules.rewrites
        if mode == Mode.TRAIN:  # see `rescaling`
            kinds = replace(kinds, rescale_layers=False)
        self._rescaler = Rescaler(self._graph, self._values, self._ops, self._evidence, kinds)
        self._scalings: dict[str, Scaling] = {}
        self._sites = self._found_sites()
        self._painted = Painted(frozenset(), {})

    def plan(self) -> tuple[list[Decision], Casts]:
        """Paint, guard and propagate until nothing changes; then write the decisions down."""
        while True:
            precision = self._precisions()
            self._rescale(precision)
            if self._apply_guards(precision):
                continue
            try:
                flows = propagate(self._graph, self._values, precision, self._dtype, self._device)
            except NoKernelError as refusal:
                reason = f"it has no {name_of(self._dtype)} kernel"
                refused = Ruling(
                    DecisionKind.REFUSED, Category.DENY, "no kernel", reason, "",
                    evidence=refusal.cause,
                )  # fmt: skip
                self._pin(refusal.node, refused)
                continue
            settled = Settled(
                self._rulings, self._index, self._painted, self._scalings, self._sites, flows
            )
            writer = Writer(
                self._region, self._mode, settled, self._evidence, self._rules.painting,
                self._dtype, self._device,
            )  # fmt: skip
            return writer.decisions(), writer.casts()

    # --- categories ------------------------------------------------------------------------------

    def _is_concerned(self, node: fx.Node) -> bool:
        """Whether the node makes a tensor from an FP32 tensor. What picks from a tuple goes with
        the node that made the tuple."""
        if (
            node.op != "call_function"
            or node.target is operator.getitem
            or not any(
                isinstance(leaf, Value) for leaf in pytree.tree_leaves(self._values[node.name])
            )
        ):
            return False
        return any(
            self._values[producer.name].dtype == torch.float32
            for _, producer in tensor_arguments(node, self._values)
        )

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
                name: Precision.AS_IS if ruling.explicit else alone[ruling.category]
                for name, ruling in self._rulings.items()
            }
        index = self._index
        pinned = {n for n, v in self._rulings.items() if v.pinned and v.category is Category.DENY}
        categories = {
            index[name]: v.own if name in pinned and v.own is not Category.ALLOW else v.category
            for name, v in self._rulings.items()
        }
        for name in pinned:
            if self._rulings[name].own is Category.ALLOW:
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
            if self._rulings[node.name].explicit or facts_of_target(node.target).is_a(
                Family.RAW_MEMORY
            ):
                precision[node.name] = Precision.AS_IS
            elif index[node.name] in self._painted.low:
                precision[node.name] = Precision.LOW
            else:
                precision[node.name] = Precision.ORIGINAL
        for node in self._nodes:
            # A lookup delivers low values only where nobody wants them back in FP32, or where its
            # table is held in low precision anyway.
            if (
                precision[node.name] is Precision.LOW
                and facts_of_target(node.target).delivers_low
                and any(precision.get(user.name) is not Precision.LOW for user in node.users)
                and not is_table_low(node, self._tensors, precision)
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

    # --- rewrites --------------------------------------------------------------------------------

    def _rescale(self, precision: Mapping[str, Precision]) -> None:
        """Find the regions that are held scaled; the guards then see what they hold."""
        found = self._rescaler.find(
            lambda node: precision.get(node.name) is Precision.LOW, self._dtype
        )
        if found != self._scalings:
            self._scalings = found
            self._sites = self._found_sites()

    # --- guards ----------------------------------------------------------------------------------

    def _apply_guards(self, precision: Mapping[str, Precision]) -> bool:
        """Pin the low nodes on which a guard fires; whether there were any."""
        fired = False
        for node in self._nodes:
            if precision[node.name] is Precision.LOW and not self._rulings[node.name].pinned:
                finding = guarding.first_finding(self._site(node), self._rules.guards, self._dtype)
                if finding is not None:
                    fired = True
                    self._pin(node.name, ruling_of(finding))
        return fired

    def _site(self, node: fx.Node) -> Site:
        """The node's site, with its arguments as the mixed graph has them."""
        site, scaling = self._sites.of(node), self._scalings.get(node.name, UNSCALED)
        names = [name for name, _ in tensor_arguments(node, self._values)]
        factors = {names[i]: factor for i, factor in scaling.operands.items()}
        operands = [
            replace(o, range=o.range.scaled(factors[o.argument]))
            if o.range is not None and o.argument in factors
            else o
            for o in site.operands
        ]
        numbers = {name: n * scaling.number for name, n in site.scalars.items()}
        return replace(site, operands=operands, scalars=numbers)

    def _found_sites(self) -> Sites:
        return Sites(
            self._graph, self._values, self._ops, self._held_range,
            self._evidence.growth, self._evidence.weight, self._device, self._evidence.batches,
            masks=self._rules.rewrites.clamp_masks,
        )  # fmt: skip

    def _held_range(self, node: fx.Node) -> Range | None:
        """The range of a value as the mixed graph holds it."""
        seen, scaling = self._evidence.range(node), self._scalings.get(node.name, UNSCALED)
        return seen.scaled(scaling.result) if seen is not None else None

    def _pin(self, name: str, ruling: Ruling) -> None:
        was = self._rulings[name]
        source = "measured" if ruling.evidence else was.source
        self._rulings[name] = replace(ruling, source=source, pinned=True, own=was.own)
