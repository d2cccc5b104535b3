"""One node's rounding put into the FP32 graph, and no other: what the outputs' error is then.

It costs a forward pass a node, and holds where first order does not: at a router, behind a large
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.attribute.local_errors import Site
from amp_convert.capture.export import CapturedGraph
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.rewrite.graph_execution import GraphExecution


def outputs_with(
    captured: CapturedGraph, inputs: Sequence[Any], sites: Sequence[Site]
) -> Sequence[Any]:
    """The flat outputs of an FP32 graph in which the errors of `sites` are added to the values."""
    graph = captured.graph_module
    errors: dict[str, dict[int, torch.Tensor]] = {}
    for site in sites:
        if site.error is not None:
            errors.setdefault(site.node, {})[site.part] = site.error
    running = GraphExecution(graph, inputs)
    with torch.no_grad():
        for node in graph.graph.nodes:
            running.execute(node)
            info = captured.nodes.get(node.name)
            if info is not None and info.identity in errors:
                running.values[node] = _shifted(running.values[node], errors[info.identity])
            if node.op != "output":
                running.free()
    outputs: Sequence[Any] = running.values[node]
    return outputs


def _shifted(value: Any, errors: dict[int, torch.Tensor]) -> Any:
    """A result with errors added to its parts, numbered as in `Site`."""
    count = iter(range(len(pytree.tree_leaves(value))))

    def moved(leaf: Any) -> Any:
        if not is_float_tensor(leaf) or not leaf.numel():
            return leaf
        error = errors.get(next(count))
        return leaf if error is None else leaf + error

    return pytree.tree_map(moved, value)
