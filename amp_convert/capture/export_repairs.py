"""Repairs that make an exported graph fit for conversion.

There are six, none of which changes a bit of the FP32 result:

1. A `.to(float32)` on an FP32 value is a no-op that export drops, yet it is the model's own request
   for FP32 and has to hold once its input is FP16. It is marked before and restored after.
2. `view` asks for strides that only tracing promised; `reshape` takes what the kernel returns.
3. `_assert_tensor_metadata` repeats the FP32 dtypes of the trace; it would reject every conversion.
4. Inactive dropout is the identity in eager mode, but a copy in the trace. The copy goes.
5. What a `torch.no_grad()` region returns is detached, since decomposing forgets the region.
6. A `torch.autocast(enabled=False)` region is the model's own request for FP32 as well. Decomposing
   would forget it, and which layer and line each of its nodes comes from: it is put into the graph
   around it before, each node marked.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
AUTOCAST_OFF = "amp_convert_autocast_off"
"""The key in a node's custom metadata that marks it as under `torch.autocast(enabled=False)`."""


@torch.library.custom_op("amp_convert::explicit_cast", mutates_args=())
def _explicit_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype, copy=True)


@_explicit_cast.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


_CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
)  # fmt: skip


def mark_explicit_cast(node: fx.Node) -> None:
    """Repair 1, before decomposition: keep a cast that does nothing while everything is FP32."""
    if node.target not in _CASTS or node.kwargs.get("copy"):
        return
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return
    if before.is_floating_point() and before.dtype == after.dtype and before.device == after.device:
        node.target = torch.ops.amp_convert.explicit_cast.default
        node.args, node.kwargs = (node.args[0], after.dtype), {}


def detach_no_grad(node: fx.Node) -> None:
    """Repair 5, before decomposition."""
    region = node.args[0] if node.target is operator.getitem else None
    if not isinstance(region, fx.Node) or region.args[:1] != (False,):
        return
    if region.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        with node.graph.inserting_after(node):
            detached = node.graph.call_function(aten.detach.default, (node,))
        detached.meta = dict(node.meta)
        node.replace_all_uses_with(detached, lambda user: user is not detached)


def inline_autocast_off(graph_module: fx.GraphModule) -> None:
    """Repair 6, before decomposition."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_autocast or node.args[2]:
            continue
        region = getattr(graph_module, str(node.args[4].target))
        inline_autocast_off(region)
        given = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        values = dict(zip(given, node.args[5:], strict=True))
        with graph.inserting_before(node):
            for inner in region.graph.nodes:
                if inner.op not in ("placeholder", "output"):
                    values[inner] = _copied(graph_module, region, inner, values)
        (outputs,) = region.graph.output_node().args
        results = fx.map_arg(outputs, values.__getitem__)
        for user in list(node.users):  # the region gives a tuple
            name, result = user.name, results[user.args[1]]
            user.replace_all_uses_with(result)
            graph.erase_node(user)
            if any(reader.op == "output" for reader in result.users):
                result.name = name  # the program's signature knows its outputs by name
        graph.erase_node(node)
    graph_module.recompile()


def _copied(
    graph_module: fx.GraphModule, region: fx.GraphModule, inner: fx.Node, values: dict[fx.Node, Any]
) -> fx.Node:
    """A node of a region in the graph around it, marked as under no autocast."""
    copy = graph_module.graph.node_copy(inner, values.__getitem__)
    if inner.op == "get_attr":  # a region within the region
        name = f"autocast_off_{len(list(graph_module.named_children()))}"
        setattr(graph_module, name, getattr(region, str(inner.target)))
        copy.target = name
    copy.meta["custom"] = {**copy.meta.get("custom", {}), AUTOCAST_OFF: True}
    return copy


def repair(graph: fx.Graph) -> None:
    """The repairs after decomposition."""
    for node in list(graph.nodes):
        if node.target is torch.ops.amp_convert.explicit_cast.default:
            node.target = aten.to.dtype
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten.copy.default:  # it has no derivative
            _expand_source(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_inactive_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _expand_source(copy: fx.Node) -> None:
    """`copy(destination, source)` is the source in the shape and dtype of the destination."""
    destination, source = copy.args[:2]
    assert isinstance(destination, fx.Node)
    assert isinstance(source, fx.Node)
    if source.meta["val"].dtype != destination.meta["val"].dtype:
        with copy.graph.inserting_before(copy):
            source = copy.graph.call_function(
                aten._to_copy.default, (source,), {"dtype": destination.meta["val"].dtype}
            )
        source.meta = dict(copy.meta)
    copy.target, copy.args = aten.expand_as.default, (source, destination)


def _is_inactive_dropout(node: fx.Node) -> bool:
    made_by = node.meta.get("torch_fn", ("", ""))[1]
    return (
        node.target is aten.clone.default
        and not node.kwargs
        and "dropout" in made_by
        and node.args[0].op != "placeholder"  # type: ignore[union-attr]
    )
