"""Calls through eager's own bindings, which cost less than those through `torch.ops`.

`torch.ops.aten.add.Tensor(x, y)` looks its arguments up in a schema; `torch.add(x, y)` has a parser
made for it. At small batches that is a good part of the time of a model.

Takes for granted that a function here takes the operator's arguments in the operator's order; that
it is the same function is held by a test that runs both. Keeps: every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_nn: Any = torch._C._nn
_T = torch.Tensor

BINDINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.adaptive_avg_pool2d.default: _nn.adaptive_avg_pool2d,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: _T.add_,
    aten.addmm.default: torch.addmm,
    aten.avg_pool2d.default: _nn.avg_pool2d,
    aten.batch_norm.default: torch.batch_norm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.div_.Tensor: _T.div_,
    aten.embedding.default: torch.embedding,
    aten.exp.default: torch.exp,
    aten.expand.default: _T.expand,
    aten.gelu.default: _nn.gelu,
    aten.gelu_.default: _nn.gelu_,
    aten.group_norm.default: torch.group_norm,
    aten.hardswish.default: _nn.hardswish,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: _nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: _T.mul_,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: _nn.scaled_dot_product_attention,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: _nn.silu,
    aten.silu_.default: _nn.silu_,
    aten.sin.default: torch.sin,
    aten.softmax.int: torch.softmax,
    aten.split.Tensor: torch.Tensor.split,
    aten.sub.Tensor: torch.sub,
    aten.sym_size.int: _T.size,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `_to_copy` does of which nothing but the dtype is asked, and that is another one."""
    return tensor.to(dtype)


def bind(graph: fx.Graph) -> None:
    """Call what has a binding through it."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in BINDINGS:
            node.target = BINDINGS[node.target]
        elif node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            source, wanted = node.args[0], node.kwargs["dtype"]
            if source.meta.get("dtype") not in (None, wanted):
                node.target, node.args, node.kwargs = cast, (source, wanted), {}
