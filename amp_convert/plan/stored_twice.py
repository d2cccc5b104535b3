"""Weights that a frozen model holds in FP32 and in low precision, since it reads both.

A table that is looked up and multiplied is low for both (see `tied_tables`), unless a guard has
measured that what reads its entries cannot bear the rounding. What that costs is said here, of
tables as of any other weight. What is computed from weights alone is computed when a model is
frozen, and reads nothing at a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import fx

from amp_convert.capture.captured import Captured, Region, Value
from amp_convert.capture.graph_signature import Source
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import FULL
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.plan.costs import StoredTwice
from amp_convert.plan.dtype_flow import tensor_arguments
from amp_convert.plan.plan import Decision


def stored_twice(
    captured: Captured, decisions: Iterable[Decision], low: torch.dtype
) -> tuple[StoredTwice, ...]:
    """The weights of the eval plan that these are the decisions of, the largest first."""
    by_node = {decision.node: decision for decision in decisions}
    found = [
        weight
        for region, mode in captured.graphs()
        if mode is Mode.EVAL
        for weight in _of_region(region, by_node, low)
    ]
    return tuple(sorted(found, key=lambda each: -each.low_bytes))


def _of_region(
    region: Region, by_node: Mapping[str, Decision], low: torch.dtype
) -> Iterator[StoredTwice]:
    graph, values = region.graphs[Mode.EVAL], region.traces[Mode.EVAL].values
    tensors = region.runner(Mode.EVAL).tensors()
    weights: dict[fx.Node, tuple[str, torch.Tensor]] = {}
    for (node, spec), tensor in zip(
        graph.signature.placeholders(graph.graph_module.graph).items(), tensors, strict=True
    ):
        if tensor is not None and spec.source is not Source.USER and not spec.mutated:
            weights[node] = (region.qualified(spec.target), tensor)
    constant, cast = set(weights), set[fx.Node]()
    readers: dict[int, dict[bool, list[Decision]]] = {}
    names: dict[int, tuple[str, torch.Tensor]] = {}
    for node in graph.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        decision = by_node[graph.nodes[node.name].identity]
        if node.all_input_nodes and constant.issuperset(node.all_input_nodes):
            constant.add(node)
            source = node.all_input_nodes[0]
            if facts_of_target(node.target).is_a(Family.SHAPE) and source in weights:
                weights[node] = weights[source]  # a view, which may be of the cast weight
                cast |= {node} if decision.low else set()
            continue
        arguments = tensor_arguments(node, values)
        for (_, source), planned in zip(arguments, decision.inputs, strict=True):
            if source in weights and _is_fp32(values, source):
                name, tensor = weights[source]
                names.setdefault(id(tensor), (name, tensor))
                is_low = planned.dtype != FULL if planned.dtype else source in cast
                is_low = is_low or _delivers_low(node, decision)
                readers.setdefault(id(tensor), {}).setdefault(is_low, []).append(decision)
    for key, (name, tensor) in names.items():
        if len(readers[key]) == 2:
            reader = readers[key][False][0]
            yield StoredTwice(
                weight=name,
                low_bytes=tensor.numel() * low.itemsize,
                reader=reader.node,
                reason=reader.reason,
                evidence=reader.evidence,
            )


def _is_fp32(values: Mapping[str, object], node: fx.Node) -> bool:
    value = values.get(node.name)
    return isinstance(value, Value) and value.dtype == torch.float32


def _delivers_low(node: fx.Node, decision: Decision) -> bool:
    """Whether the node is a lookup of low entries: its table is stored low."""
    return facts_of_target(node.target).delivers_low and decision.output_dtype not in (None, FULL)
