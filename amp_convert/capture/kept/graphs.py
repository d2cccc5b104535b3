"""What capturing a module came to, as an entry of the cache (see `answers`), and back.

Graphs come back bound to the module at hand. What cannot be written plainly (a graph with regions
of its own, a sparse constant, an output structure that PyTorch knows no name for) is captured anew
each time. A graph from the cache is compared with the eager model like any other before it is
believed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Region, Trace, Value
from amp_convert.capture.export import CapturedGraph
from amp_convert.capture.export_call import bound_arguments
from amp_convert.capture.graph_signature import (
    InputSpec,
    Signature,
    Source,
    UserInput,
    size_guard,
)
from amp_convert.capture.kept import fingerprint
from amp_convert.capture.kept.answers import kept
from amp_convert.capture.node_info import NodeInfo
from amp_convert.capture.stored_graph import (
    FunctionRef,
    NodeRef,
    OperatorRef,
    StoredGraph,
    restored,
    stored,
)
from amp_convert.core.files.cache import Entry
from amp_convert.core.files.plain_data import NotPlainError, PlainData
from amp_convert.core.mode import Mode


def region_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str,
    wanted: str,
    trace: Callable[[], Region],
) -> Region:
    """The region that `trace` makes of a module, or made of it before. What it raises passes
    through and is not kept: what stood in the way may be gone the next time."""

    def about() -> str:
        return fingerprint.of_call(module, (args, dict(kwargs)), path, wanted)

    def read(entry: Entry) -> Region:
        return _read(entry, module, args, kwargs)

    return kept(f"the graphs of {path or 'the model'}", about, trace, _written, read)


# --- entries -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Structure:
    """A `TreeSpec`: the name of its container, None for a leaf."""

    kind: str | None
    context: Any
    children: list[_Structure]


_PLAIN = PlainData(
    _Structure, FunctionRef, InputSpec, Mode, NodeInfo, NodeRef, OperatorRef, Source, Trace,
    UserInput, Value,
)  # fmt: skip


def _written(region: Region) -> Entry:
    if region.train_failure:
        raise NotPlainError(f"it has no train graph: {region.train_failure}")
    tensors: dict[str, torch.Tensor] = {}
    graphs = {str(mode): _graph_data(graph, tensors) for mode, graph in region.graphs.items()}
    held = {"path": region.path, "graphs": graphs, "traces": dict(region.traces)}
    return Entry(_PLAIN.write(held), tensors)


def _graph_data(graph: CapturedGraph, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    signature, plain = graph.signature, stored(graph.graph_module)
    if plain.attributes:
        raise NotPlainError("a graph has regions of its own")
    for name, constant in graph.constants.items():
        if constant.layout is not torch.strided or constant.is_quantized or 0 in constant.stride():
            raise NotPlainError(f"the constant {name} is no plain tensor")
        tensors[f"{graph.mode} {name}"] = constant
    for op, _, target, *_ in plain.nodes:
        try:
            _check_call(op, target)
        except ValueError as error:
            raise NotPlainError(str(error)) from error
    return {
        "nodes": list(plain.nodes),
        "infos": dict(graph.nodes),
        "constants": {n: [c.device, list(c.stride())] for n, c in graph.constants.items()},
        "guards": [guard.holds.code for guard in signature.guards],
        "inputs": list(signature.inputs),
        "user_inputs": [replace(given, value=None) for given in signature.user_inputs],
        "outputs": _structure(signature.out_spec),
        "buffer_outputs": list(signature.buffer_outputs),
        "input_outputs": list(signature.input_outputs),
        "fixed_sizes": graph.fixed_sizes,
        "has_choices": graph.has_choices,
    }


def _read(
    entry: Entry, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Region:
    held = _PLAIN.read(entry.document)
    try:
        graphs = {
            Mode(mode): _graph(Mode(mode), data, entry.tensors, module, args, kwargs)
            for mode, data in held["graphs"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise NotPlainError(f"it is of another make: {error}") from error
    return Region(held["path"], module, args, kwargs, graphs, held["traces"])


def _graph(
    mode: Mode,
    data: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> CapturedGraph:
    bound = bound_arguments(module, args, kwargs)
    leaves, in_spec = pytree.tree_flatten(list(bound.arguments.values()))
    users = [
        given if given.shape is not None else replace(given, value=leaf)
        for given, leaf in zip(data["user_inputs"], leaves, strict=True)
    ]
    signature = Signature(
        call=bound.signature,
        guards=tuple(size_guard(_arithmetic(code)) for code in data["guards"]),
        inputs=tuple(data["inputs"]),
        names=tuple(bound.arguments),
        user_inputs=tuple(users),
        in_spec=in_spec,
        out_spec=_spec(data["outputs"]),
        buffer_outputs=tuple(data["buffer_outputs"]),
        input_outputs=tuple(data["input_outputs"]),
    )
    constants = {
        name: _laid_out(tensors[f"{mode} {name}"].to(device), stride)
        for name, (device, stride) in data["constants"].items()
    }
    for op, _, target, *_ in data["nodes"]:
        _check_call(op, target)
    graph_module = restored(StoredGraph(tuple(data["nodes"]), {}))
    return CapturedGraph(
        mode=mode,
        graph_module=graph_module,
        signature=signature,
        constants=constants,
        nodes=data["infos"],
        fixed_sizes=data["fixed_sizes"],
        has_choices=data["has_choices"],
    )


def _laid_out(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    if list(tensor.stride()) == stride:
        return tensor
    return torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _check_call(op: str, target: Any) -> None:
    """Raises ValueError for a node that does more than compute."""
    if op in ("placeholder", "output") or (op == "call_function" and type(target) is FunctionRef):
        return
    if op == "call_function" and type(target) is OperatorRef and target.path[0] == "aten":
        _, name, overload = target.path
        found = getattr(getattr(torch.ops.aten, name), overload)
        if not found._schema.is_mutable and name not in ("from_file", "save"):
            return
    raise ValueError(f"{target} is no operator that is kept")


def _arithmetic(code: str) -> str:
    """The text of a condition on sizes, which is evaluated: raises ValueError for one that does
    anything but compute with them."""
    for node in ast.walk(ast.parse(code, mode="eval")):
        fine = isinstance(node, _ARITHMETIC) and not isinstance(node, ast.Pow)
        if isinstance(node, ast.Name):
            fine = node.id in ("L", "math", "torch")
        elif isinstance(node, ast.Attribute):
            fine = node.attr in _OF_SIZES
        if not fine:
            raise ValueError(f"{code} is no condition on sizes")
    return code


_ARITHMETIC = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop,
    ast.Compare, ast.cmpop, ast.Call, ast.Subscript, ast.Constant, ast.expr_context,
)  # fmt: skip
_OF_SIZES = ("size", "stride", "storage_offset", "ceil", "floor", "trunc", "sqrt", "sym_max",
             "sym_min", "sym_float", "sym_int", "sym_ite", "sym_not", "_sym_sqrt")  # fmt: skip
"""What a condition may ask of inputs, of `math` and of `torch`."""


def _structure(spec: pytree.TreeSpec) -> _Structure:
    if spec.is_leaf():
        return _Structure(None, None, [])
    children = [_structure(child) for child in spec.children()]
    return _Structure(_name(spec.type), _PLAIN.write(spec.context), children)


def _spec(found: _Structure) -> pytree.TreeSpec:
    if found.kind is None:
        return pytree.tree_structure(0)
    kinds = [kind for kind in pytree.SUPPORTED_NODES if _name(kind) == found.kind]
    if len(kinds) != 1:
        raise ValueError(f"PyTorch knows no container {found.kind}")
    children = [_spec(child) for child in found.children]
    return pytree.TreeSpec(kinds[0], _PLAIN.read(found.context), children)


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
