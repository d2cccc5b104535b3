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

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
AUTOCAST_OFF = "amp_convert_autocast_off"
"""The key in a node's custom metadata that marks it as under `torch.autocast(enabled=False)`."""

GOES_LOW = "amp_convert_goes_low"
"""The key that marks a cast to another tensor's dtype, and says where that is a low one."""


@torch.library.custom_op("amp_convert::explicit_cast", mutates_args=())
def _explicit_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype, copy=True)


def _remember_dtype(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.dtype = inputs[0].dtype


_explicit_cast.register_autograd(
    lambda ctx, gradient: (gradient.to(ctx.dtype), None), setup_context=_remember_dtype
)


@_explicit_cast.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


_CASTS = (aten.to.dtype, aten.to.device, aten.to.other, aten.type_as.default)


_NAMES_A_DTYPE = (torch.dtype, torch.Tensor)
_METHODS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")


@contextlib.contextmanager
def distinct_casts() -> Iterator[None]:
    """While this is open, for a trace: a cast that does nothing gives a tensor of its own all the
    same.

    Eager gives the tensor back that it was given. To a trace that is one tensor with two names, and
    all that reads the one later, such as a residual connection, would read the other.
    """

    def distinct(name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = method(*args, **kwargs)
        if result is args[0] and result.is_floating_point():
            given = (*args[1:], *kwargs.values())
            if name != "to" or any(isinstance(a, _NAMES_A_DTYPE) for a in given):
                return torch.ops.amp_convert.explicit_cast(result, result.dtype)
        return result

    with patched_methods(_METHODS, distinct):
        yield


@contextlib.contextmanager
def patched_methods(
    names: Iterable[str], call: Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """While this is open, these methods of tensors go through `call`, in this thread, which gets
    their names, the methods themselves and what they are called with. A function mode would stand
    in the way of all other functions too, and warnings of PyTorch's would name us as their place.
    """

    mine = threading.get_ident()

    def patch(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        @functools.wraps(method)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != mine:
                return method(*args, **kwargs)
            return call(name, method, args, kwargs)

        return patched

    with _PATCHING:
        kept = {n: torch.Tensor.__dict__[n] for n in names if n in torch.Tensor.__dict__}
        try:
            for name in names:
                setattr(torch.Tensor, name, patch(name))
            yield
        finally:
            for name in names:
                if name in kept:
                    setattr(torch.Tensor, name, kept[name])
                elif name in torch.Tensor.__dict__:
                    delattr(torch.Tensor, name)


_PATCHING = threading.RLock()
"""One thread at a time: what is put on a class last has to come off first."""


def mark_explicit_cast(node: fx.Node, goes_low: frozenset[str] = frozenset()) -> None:
    """Repair 1, before decomposition: keep a cast that does nothing while everything is FP32.
    `goes_low` is where it asks for a low dtype, as in `NodeInfo`.

    `x.to(device)` is no cast, though the trace gives it x's dtype: it comes as `to.dtype_layout`,
    which nothing that names a dtype does.
    """
    explicit = torch.ops.amp_convert.explicit_cast.default
    if node.target not in _CASTS or _copies(node):
        return
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return
    if before.is_floating_point() and before.dtype == after.dtype and before.device == after.device:
        marked = [user for user in node.users if user.target is explicit]
        if not marked:  # made by an operator of PyTorch's, which no function mode sees
            node.target = explicit
            node.args, node.kwargs = (node.args[0], after.dtype), {}
            marked = [node]
        for cast in marked if goes_low else ():
            cast.meta["custom"] = {**cast.meta.get("custom", {}), GOES_LOW: goes_low}


def _copies(cast: fx.Node) -> bool:
    """Whether a cast is asked for a copy, whatever the dtype."""
    names = [a.name for a in cast.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, cast.args, strict=False)), **cast.kwargs}
    return bool(given.get("copy"))


def written_casts(graphs: Iterable[fx.Graph]) -> dict[fx.Node, fx.Node]:
    """The casts of a trace whose memory is also that of something that is written in place, each
    with the value that the memory is of: in FP32 such a cast gives its argument back, and eager
    writes to both. `graphs` are the trace's own, first, and those of its regions; where a region
    writes to anything, all casts are meant."""
    first, *regions = graphs
    if any(_written(node) for graph in regions for node in graph.nodes):
        return {n: n for graph in (first, *regions) for n in graph.nodes if _is_cast(n)}
    roots: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in first.nodes:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (_is_cast(node) or _shares(node)):
            roots[node] = roots.get(source, source)
            if _written(node):
                written.add(roots[node])
    return {n: root for n, root in roots.items() if _is_cast(n) and root in written}


def _shares(node: fx.Node) -> bool:
    """Whether a call gives its first argument back, or a view of it."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.arguments and schema.arguments[0].alias_info is not None)


def _written(node: fx.Node) -> bool:
    """Whether a call writes to its first argument."""
    return _shares(node) and bool(node.target._schema.arguments[0].alias_info.is_write)  # type: ignore[union-attr]


def _is_cast(node: fx.Node) -> bool:
    """Whether a node is a cast of a trace, marked or not."""
    explicit = torch.ops.amp_convert.explicit_cast.default
    return node.target in _CASTS or node.target is explicit


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
            cast = copy.graph.call_function(
                aten._to_copy.default, (source,), {"dtype": destination.meta["val"].dtype}
            )
        cast.meta = {**copy.meta, "val": source.meta["val"].to(destination.meta["val"].dtype)}
        source = cast
    copy.target, copy.args = aten.expand_as.default, (source, destination)


def _is_inactive_dropout(node: fx.Node) -> bool:
    made_by = node.meta.get("torch_fn", ("", ""))[1]
    return (
        node.target is aten.clone.default
        and not node.kwargs
        and "dropout" in made_by
        and node.args[0].op != "placeholder"  # type: ignore[union-attr]
    )
