"""CapturedGraph + decisions -> a graph with casts. Carries out; never decides.

Every cast that the plan asks for is inserted once per (value, dtype), before its first reader, and
shared by all: a low copy lives no longer than it is used, and an FP32 value that nobody else reads
is freed on the way. The graph's outputs are brought back to the dtypes of the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Region, Value
from amp_convert.capture.export import CapturedGraph
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import castable, from_name, name_of
from amp_convert.plan.dtype_flow import is_cast_to_fp32, tensor_arguments
from amp_convert.plan.plan import Decision, Plan, PlannedInput

aten = torch.ops.aten
LAYER = "layer"
"""The key in the metadata of a node that carries out one of the FP32 graph: that one's layer."""


@dataclass(frozen=True)
class Rewritten:
    """A mixed-precision graph with the signature of the captured one.

    `meta["dtype"]` of a node that gives a tensor is that tensor's, `meta["recorded"]` what it
    was in FP32 for the example inputs. `values` maps the FX name of
    each node of the FP32 graph to the node of this one that holds its value, `origins` each node of
    this one that is no cast to the FP32 node it carries out; `casts` names the casts that were
    inserted. `decisions` has the planned decision of each call.
    """

    captured: CapturedGraph
    graph_module: fx.GraphModule
    values: Mapping[str, fx.Node] = field(repr=False)
    origins: Mapping[str, str] = field(repr=False)
    casts: tuple[str, ...]
    decisions: Mapping[str, Decision] = field(repr=False)


def rewrite(region: Region, mode: Mode, plan: Plan) -> Rewritten:
    """The graph of `region` in `mode` with the casts of `plan`."""
    captured = region.graphs[mode]
    decisions = {d.node: d for d in (plan.eval if mode == Mode.EVAL else plan.train)}
    by_name = {name: decisions[info.identity] for name, info in captured.nodes.items()}
    return _Rewriter(captured, region.traces[mode].values, by_name).run()


class _Rewriter:
    def __init__(
        self,
        captured: CapturedGraph,
        recorded: Mapping[str, object],
        decisions: Mapping[str, Decision],
    ) -> None:
        self._captured, self._recorded, self._decisions = captured, recorded, decisions
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}
        self._origins: dict[str, str] = {}
        self._cast: dict[tuple[fx.Node, torch.dtype, float | None], fx.Node] = {}
        self._scaled: dict[tuple[fx.Node, float], fx.Node] = {}

    def run(self) -> Rewritten:
        for node in self._captured.graph_module.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
            else:
                self._copy(node)
        self._graph.lint()
        root = self._captured.graph_module
        return Rewritten(
            captured=self._captured,
            graph_module=fx.GraphModule(root, self._graph),
            values=self._values,
            origins=self._origins,
            casts=tuple(node.name for node in self._cast.values()),
            decisions=self._decisions,
        )

    def _copy(self, node: fx.Node) -> fx.Node:
        new = self._graph.node_copy(node, lambda n: self._values[n.name])
        new.meta = {**node.meta, "dtype": self._dtype(node), "recorded": self._value(node)}
        if node.name in self._captured.nodes:
            new.meta[LAYER] = self._captured.nodes[node.name].layer
        self._values[node.name] = new
        self._origins[new.name] = node.name
        return new

    def _dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a node's tensor in this graph, before a cast of its result."""
        value, decision = self._recorded.get(node.name), self._decisions.get(node.name)
        if not isinstance(value, Value):
            return None
        planned = decision is not None and castable(value.dtype) and decision.output_dtype is None
        return from_name(decision.dtype) if planned and decision else value.dtype

    def _value(self, node: fx.Node) -> Value | None:
        value = self._recorded.get(node.name)
        return value if isinstance(value, Value) else None

    def _call(self, node: fx.Node) -> None:
        decision = self._decisions[node.name]
        arguments = iter(list(self._cast_arguments(node, decision)))
        new = self._copy(node)
        new.args = fx.map_arg(node.args, lambda _: next(arguments))
        new.kwargs = fx.map_arg(node.kwargs, lambda _: next(arguments))
        new.args, new.kwargs = planned_numbers((new.args, new.kwargs), decision)
        if decision.low and is_cast_to_fp32(node):
            new.args, new.kwargs = _in_place_of_fp32((new.args, new.kwargs), decision.dtype)
        if decision.output_dtype is not None:
            self._values[node.name] = self._casted(new, from_name(decision.output_dtype))

    def _cast_arguments(self, node: fx.Node, decision: Decision) -> Iterator[fx.Node]:
        """The new node for every FX node among the arguments, in order, cast where planned."""
        planned = planned_inputs(node, self._recorded, decision)
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, fx.Node):
                new = self._values[leaf.name]
                wanted = next(planned) if isinstance(self._recorded.get(leaf.name), Value) else None
                if wanted is not None and wanted.scale != 1:
                    new = self._times(new, wanted.scale)
                if wanted is not None and wanted.dtype is not None:
                    new = self._casted(new, from_name(wanted.dtype), decision.clamp)
                yield new

    def _casted(self, value: fx.Node, dtype: torch.dtype, clamp: float | None = None) -> fx.Node:
        """`value` cast to `dtype`, by one cast for all readers, and clamped before if planned."""
        key = (value, dtype, clamp)
        if key not in self._cast:
            call = self._graph.call_function
            if clamp is not None:
                raised = call(aten.clamp_min.default, (value, clamp))
                is_out = call(aten.eq.Scalar, (value, -math.inf))
                value = call(aten.where.self, (is_out, value, raised))
            known = {name: key[0].meta.get(name) for name in ("shape", "recorded")}
            self._cast[key] = call(aten._to_copy.default, (value,), {"dtype": dtype})
            self._cast[key].meta = {**known, "dtype": dtype}
        return self._cast[key]

    def _times(self, value: fx.Node, scale: float) -> fx.Node:
        """`value` times a power of two, by one product for all readers."""
        key = (value, scale)
        if key not in self._scaled:
            self._scaled[key] = self._graph.call_function(aten.mul.Tensor, key)
            self._scaled[key].meta = {k: value.meta.get(k) for k in ("shape", "dtype", "recorded")}
        return self._scaled[key]

    def _output(self, node: fx.Node) -> None:
        """Return what the original returns, in its dtypes."""

        def restored(old: fx.Node) -> fx.Node:
            new, value = self._values[old.name], self._recorded.get(old.name)
            decision = self._decisions.get(old.name)
            if decision is None or not isinstance(value, Value) or not castable(value.dtype):
                return new
            want = name_of(value.dtype)
            return new if decision.dtype == want else self._casted(new, value.dtype)

        self._graph.output(fx.map_arg(node.args[0], restored))


def _in_place_of_fp32(arguments: Any, dtype: str) -> Any:
    return pytree.tree_map(
        lambda leaf: from_name(dtype) if leaf is torch.float32 else leaf, arguments
    )


def planned_inputs(
    node: fx.Node, recorded: Mapping[str, object], decision: Decision
) -> Iterator[PlannedInput]:
    """What is planned for each tensor argument of a call, in order: a plan for a call with other
    arguments is a fault of ours."""
    names = [name for name, _ in tensor_arguments(node, recorded)]
    assert names == [planned.argument for planned in decision.inputs], decision.node
    return iter(decision.inputs)


def planned_numbers(arguments: Any, decision: Decision) -> Any:
    """Number arguments as planned: multiplied by a power of two, or else clamped."""

    def changed(leaf: Any) -> Any:
        if decision.number_scale != 1 and isinstance(leaf, int | float):
            return leaf * decision.number_scale
        if decision.clamp is not None and isinstance(leaf, float) and leaf > -math.inf:
            return max(leaf, decision.clamp)
        return leaf

    return pytree.tree_map(changed, arguments)


def held(tensor: torch.Tensor, decision: Decision) -> torch.Tensor:
    """What the mixed graph would hold of a node's FP32 result: clamped and scaled as planned."""
    if decision.clamp is not None:
        tensor = torch.where(tensor == -math.inf, tensor, tensor.clamp_min(decision.clamp))
    return tensor if decision.scale == 1 else tensor * decision.scale
