"""What a converted model runs, for the tests of kernel passes."""

from __future__ import annotations

from typing import Any

from torch import fx

from amp_convert.rewrite.kernels.tuned_graph import RunningGraph


def running(model: Any, mode: str = "eval") -> RunningGraph:
    """The graph of a mode of a model that was captured whole, converted or frozen."""
    parts = model.__dict__.get("_parts")
    runner = model.__dict__["_callee"] if parts is None else parts[""].runners[mode]
    found: RunningGraph = runner.run
    return found


def targets(graph_module: fx.GraphModule) -> list[str]:
    """The names of what a graph calls, in order."""
    return [
        getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_module")
    ]
