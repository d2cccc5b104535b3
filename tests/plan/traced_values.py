"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Value
from amp_convert.plan.dtype_flow import (
    Flow,
    Precision,
    propagate,
)

aten = torch.ops.aten


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Recorder(fx.Interpreter):
    """Shapes and dtypes of an FP32 run, as capturing records them."""

    def record(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        self.values: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = pytree.tree_map(described, result)
        return result


def described(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return Value(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)


class Traced:
    """The graph of a function of tensors. Nodes are called by their FX names, such as "add_1"."""

    def __init__(self, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
        self.graph: fx.Graph = make_fx(function, pre_dispatch=True)(*inputs).graph
        module = fx.GraphModule({}, self.graph)
        self.values = Recorder(module).record(inputs)

    def flows(
        self,
        precision: Mapping[str, Precision],
        *,
        low: torch.dtype = F16,
        device: str = "cpu",
    ) -> dict[str, Flow]:
        return propagate(self.graph, self.values, precision, low, device)

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)


def floats(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).reshape(shape).to(dtype)


def effect(flow: Flow) -> tuple[Any, Any]:
    """What is cast on the way in, and the dtypes on the way out."""
    return flow.inputs, flow.result


def mixed_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`mul` is low, so `add` sees one low and one FP32 value."""
    return aten.add(aten.mul(x, x), y)
