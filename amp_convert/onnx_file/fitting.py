"""A copy of a rewritten graph that ONNX can express: step 1 of `build`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from amp_convert.capture.captured import Region
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.onnx_file.labels import MARK
from amp_convert.onnx_file.ports import (
    is_fp32_output,
    tensor_outputs,
)
from amp_convert.plan.plan import Decision
from amp_convert.rewrite.insert_casts import Rewritten

if TYPE_CHECKING:
    pass


aten = torch.ops.aten


def fitted(region: Region, rewritten: Rewritten, border: torch.dtype | None) -> Rewritten:
    """A copy of the graph that ONNX can express, every node marked with its name."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    results: Any = graph.graph_copy(rewritten.graph_module.graph, copied)
    for old, new in copied.items():
        new.meta["custom"] = {MARK: old.name}
    for old, new in copied.items():
        facts = facts_of_target(new.target)
        if facts.is_a(Family.NORM) and facts.kept_arguments("cpu"):  # ONNX wants one dtype
            _cast_parameters(new, rewritten.decisions.get(rewritten.origins.get(old.name, "")))
    if border is not None:
        _widen_inputs(region, graph)
    kept = [results[i] for i in tensor_outputs(region)]
    if border is not None:
        kept = [_cast(graph, n, border) if is_fp32_output(region, i) else n
                for n, i in zip(kept, tensor_outputs(region), strict=True)]  # fmt: skip
    graph.output(tuple(kept))
    module = fx.GraphModule(rewritten.graph_module, graph)
    return dataclasses.replace(rewritten, graph_module=module)


def _cast_parameters(norm: fx.Node, decision: Decision | None) -> None:
    """Cast scale and bias of a low normalisation to the dtype of its input."""
    if decision is None or not decision.low:
        return
    for parameter in [n for n in norm.args[1:] if isinstance(n, fx.Node)]:
        with norm.graph.inserting_before(norm):
            cast = _cast(norm.graph, parameter, from_name(decision.dtype))
        norm.replace_input_with(parameter, cast)


def _widen_inputs(region: Region, graph: fx.Graph) -> None:
    """Cast each FP32 input of the original to FP32, which it will not be."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    signature = region.graphs[Mode.EVAL].signature
    for leaf, node in signature.users(signature.placeholders(graph)):
        if leaf.dtype == torch.float32:
            with graph.inserting_before(first):
                wide = _cast(graph, node, torch.float32)
            _replace_elsewhere(node, wide)


def _replace_elsewhere(node: fx.Node, by: fx.Node) -> None:
    """Let everything but `by` read that in place of `node`."""
    node.replace_all_uses_with(by, lambda user: user is not by)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta["custom"] = {MARK: cast.name}
    return cast
