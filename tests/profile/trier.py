"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from amp_convert.profile.growth import Growth
from amp_convert.profile.rounding_trials import Trials, keep_window

F16, BF16 = torch.float16, torch.bfloat16


class Trier(fx.Interpreter):
    """Runs a graph as calibration does, and keeps what the trials say of each node."""

    def __init__(self, graph_module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(graph_module)
        self.user_to_last_uses = keep_window(graph_module.graph, self.user_to_last_uses)
        self.trials = Trials(graph_module.graph, {"sub": "the difference"}, {}, dtype)
        self.found: dict[str, Growth] = {}
        self.kept = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.kept = max(self.kept, len(self.env))
        for node, growth in self.trials.of(n, self.env, result):
            self.found[node.name] = growth.merged(self.found.get(node.name, growth))
        return result


def tried(
    compute: Callable[..., Any], *inputs: torch.Tensor, dtype: torch.dtype = F16
) -> dict[str, Growth]:
    trier = Trier(make_fx(compute)(*inputs), dtype)
    trier.run(*inputs)
    return trier.found


def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean


def blamed(found: dict[str, Growth]) -> dict[str, str]:
    return {name: growth.reader for name, growth in found.items() if not growth.result <= 20}
