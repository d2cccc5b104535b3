"""Casts that meet, double, or can be made before a value is repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from amp_convert.rewrite.kernels.casts import merge
from tests.bits import assert_same_bits

aten = torch.ops.aten
F, H, B = torch.float32, torch.float16, torch.bfloat16


def _graph(dtype: torch.dtype, build: Any) -> fx.GraphModule:
    """A graph of one input, whose nodes know their dtypes and shapes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"dtype": dtype, "shape": (3, 1)}

    def call(target: Any, source: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, (source, *args), kwargs)
        cast = kwargs.get("dtype", args[0] if target is aten.to.dtype else None)
        shape = (3, 5) if target is aten.expand.default else source.meta["shape"]
        node.meta = {"dtype": cast or source.meta["dtype"], "shape": shape}
        return node

    graph.output(build(call, x))
    return fx.GraphModule(torch.nn.Module(), graph)


def _to(call: Any, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    made: fx.Node = call(aten._to_copy.default, x, dtype=dtype)
    return made


def _relu(call: Any, x: fx.Node) -> fx.Node:
    made: fx.Node = call(aten.relu.default, x)
    return made


CASES = {
    "to its own dtype": (F, lambda call, x: (_relu(call, call(aten.to.dtype, x, F)),), 0),
    "twice": (
        F, lambda call, x: (_relu(call, _to(call, x, H)), _relu(call, call(aten.to.dtype, x, H))), 1
    ),
    "returned": (F, lambda call, x: (_to(call, x, F), call(aten.to.dtype, x, F)), 2),
    "to two dtypes": (F, lambda call, x: (_to(call, x, H), _to(call, x, B)), 2),
    "there and back": (H, lambda call, x: (_relu(call, _to(call, _to(call, x, F), H)),), 0),
    "there and elsewhere": (H, lambda call, x: (_to(call, _to(call, x, F), B),), 2),
    "down and up": (F, lambda call, x: (_to(call, _to(call, x, H), F),), 2),
    "there, read, and back": (
        H, lambda call, x: (y := _to(call, x, F), _relu(call, _to(call, y, H))), 1
    ),
    "repeated": (
        F, lambda call, x: (_relu(call, _to(call, call(aten.expand.default, x, [3, 5]), H)),), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_is_left(what: str) -> None:
    dtype, build, left = CASES[what]
    before, after = _graph(dtype, build), _graph(dtype, build)
    merge(after.graph)
    after.graph.lint()
    after.recompile()
    x = torch.tensor([[70000.0], [1e-9], [1.2345]]).to(dtype)
    assert_same_bits(before(x), after(x))
    casts = [n for n in after.graph.nodes if n.target in (aten._to_copy.default, aten.to.dtype)]
    assert len(casts) == left
    if what == "repeated":
        [cast] = casts
        assert cast.args[0].op == "placeholder"
