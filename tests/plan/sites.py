"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.regions import capture
from amp_convert.plan.guards import Site
from amp_convert.plan.node_context import Sites
from amp_convert.profile.calibrate import Range
from amp_convert.profile.growth import Growth


class Module(nn.Module):
    """A layer, a table, a normalisation, a buffer, and `compute(self, *inputs)` over them."""

    offset: torch.Tensor

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.batch = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.table, self.compute = nn.Embedding(5, 4), compute
        self.register_buffer("offset", torch.ones(4))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.compute(self, *inputs)


X = torch.linspace(0.5, 1, 8).reshape(2, 4)


def sites_of(
    compute: Callable[..., Any], *inputs: torch.Tensor, device: str = "cpu", masks: bool = False
) -> dict[str, Site]:
    """The site of each call: "mul" for the first product, "mul#1" for the second. Each value's
    range says where the value stands in the graph: the third node's is 3."""
    region = capture(Module(compute).eval(), inputs or (X,), {}).regions[0]
    captured = region.graphs["eval"]
    graph = captured.graph_module.graph
    ops = {name: info.short_op for name, info in captured.nodes.items()}
    numbers = {node: float(i) for i, node in enumerate(graph.nodes, 1)}

    def weight_of(node: fx.Node) -> str:
        return node.name if node.name.startswith(("p_", "b_", "c_")) else ""

    sites = Sites(
        graph,
        region.traces["eval"].values,
        ops,
        lambda node: Range(numbers[node], numbers[node]),
        lambda node: Growth(numbers[node]),
        weight_of,
        device,
        3,
        masks=masks,
    )
    names = {name: info.identity.rpartition("/")[2] for name, info in captured.nodes.items()}
    return {
        names[n.name].removeprefix("aten.").removesuffix("#0"): sites.of(n)
        for n in graph.nodes
        if n.op == "call_function"
    }
