"""What each node and value of an exported ONNX graph says about where it comes from.

A mark travels with each node of the converted graph: its FX name, in `meta["custom"]`, which
PyTorch carries through every trace and decomposition. Here the marks are translated into
`metadata_props`, which stay with the file:

- A node gets the keys of `NODE_KEYS`: what the plan says about the operator that it comes from.
- A value that is the result of an FX node gets that node's name, by which validation finds it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from amp_convert.core.number_formats import name_of
from amp_convert.onnx_file import passes as onnx_passes
from amp_convert.rewrite.insert_casts import Rewritten

if TYPE_CHECKING:
    import onnx_ir as ir

PREFIX = "amp_convert."
NODE_KEYS = ("node", "layer", "dtype", "rule", "reason", "location")
"""What each ONNX node says of itself, after PREFIX: the fields of its plan row, by their names
there. A cast has the dtype that it makes, and what it is for as its reason."""
FX_KEY = f"{PREFIX}fx"
"""Of a node: the FX node that it belongs to. Of a value: those whose result it is, by spaces."""

MARK = "amp_convert"
"""Key of the mark in `meta["custom"]`."""


@dataclass(frozen=True)
class Label:
    """What an ONNX node says about the operator that it comes from: see `NODE_KEYS`."""

    node: str
    layer: str
    dtype: str
    rule: str
    reason: str
    location: str


def marks_of(traced: fx.Graph, folded: fx.Graph) -> dict[str, str]:
    """By the names that the exporter and constant folding may have given its value, each node of
    the folded graph.

    The parts of a tuple are made together with it, and so have its mark.
    """
    parts = {
        (node.args[0].name, node.args[1]): node.name
        for node in folded.nodes
        if node.target is operator.getitem
    }
    marks: dict[str, str] = {}
    for node in traced.nodes:
        mark = node.meta.get("custom", {}).get(MARK)
        names = [node.name, f"{node.name}__0"]
        if mark and node.target is operator.getitem:
            source, index = node.args
            mark = parts.get((mark, index), mark)
            names += [f"{source.name}_split_{index}", f"{source.name}_split_{index}_squeeze"]
        marks |= dict.fromkeys(names, mark) if mark else {}
    return marks


def tie(model: ir.Model, marks: Mapping[str, str]) -> None:
    """Note for each ONNX node the FX node that it belongs to, and for each FX node its result.

    The exporter names a value after its FX node, unless a later node passes the same value on.
    """
    values = {v.name: v for n in model.graph for v in n.outputs}
    last: dict[str, ir.Node] = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        name = next(iter(ast.literal_eval(scopes)[-1:]), "")
        node.metadata_props.clear()
        if name in marks:
            node.metadata_props[FX_KEY] = marks[name]
            last[marks[name]] = node
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *values.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    results = {mark: node.outputs[0] for mark, node in last.items()}
    results |= {mark: values[name] for name, mark in marks.items() if name in values}
    for mark, value in results.items():
        onnx_passes.add_tag(value, FX_KEY, mark)


def labels_of(rewritten: Rewritten) -> dict[str, Label]:
    """What is to be said about each node of the converted graph, by FX name."""
    infos, labels = rewritten.captured.nodes, dict[str, Label]()
    for node in reversed(rewritten.graph_module.graph.nodes):
        info = infos.get(rewritten.origins.get(node.name, ""))
        decision = rewritten.decisions.get(rewritten.origins.get(node.name, ""))
        if info is not None:
            labels[node.name] = Label(
                node=info.identity,
                layer=info.layer,
                dtype=decision.dtype if decision else "",
                rule=decision.rule if decision else "",
                reason=decision.why if decision else "",
                location=info.location,
            )
        elif node.op == "call_function":
            labels[node.name] = _added(node, labels)
    return labels


def _added(node: fx.Node, labels: Mapping[str, Label]) -> Label:
    """About a node that rewriting has put there: it belongs to what reads it."""
    readers = [labels[user.name] for user in node.users if user.name in labels]
    whom = readers[0].node if readers else "the output"
    more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    dtype = node.kwargs.get("dtype")
    what = f"cast to {name_of(dtype)}" if isinstance(dtype, torch.dtype) else "rewriting"
    layer = readers[0].layer if readers else ""
    name = name_of(dtype) if isinstance(dtype, torch.dtype) else ""
    return Label("", layer, name, "", f"{what} for {whom}{more}", "")


def annotate(model: ir.Model, labels: Mapping[str, Label]) -> None:
    """Write the labels. A node without a mark, which constant folding has made, belongs to the FX
    node whose result it has, or else to the node that reads it."""
    for node in reversed(list(model.graph)):
        readers = (reader for value in node.outputs for reader in value.consumers())
        around: list[dict[str, str]] = [
            node.metadata_props,
            *(value.metadata_props for value in node.outputs),
            *(reader.metadata_props for reader in readers),
        ]
        mark = next((found[FX_KEY] for found in around if FX_KEY in found), "").split(" ")[0]
        if mark:
            node.metadata_props[FX_KEY] = mark
        label = labels.get(mark)
        for key in NODE_KEYS if label is not None else ():
            if text := getattr(label, key):
                node.metadata_props[f"{PREFIX}{key}"] = text
