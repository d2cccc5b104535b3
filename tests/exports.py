"""Graphs of functions of one input and one linear layer, and how tests read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.export import CapturedGraph, export_graph
from amp_convert.capture.graph_call import GraphRunner

aten = torch.ops.aten

X = torch.linspace(-1, 1, 24).reshape(6, 4)


def calls(graph: CapturedGraph) -> list[fx.Node]:
    return [n for n in graph.graph_module.graph.nodes if n.op == "call_function"]


def targets(graph: CapturedGraph) -> list[Any]:
    return [n.target for n in calls(graph)]


class Function(nn.Module):
    """A function of the input and one linear layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def graph_of(function: Callable[..., Any], mode: str = "eval", x: torch.Tensor = X) -> Any:
    """(graph, what it returns for x, what the function returns for x)"""
    module = Function(function).train(mode == "train")
    graph = export_graph(module, (x,), {}, mode)
    runner = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    return graph, runner(x), module(x)
