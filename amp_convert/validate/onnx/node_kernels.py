"""Single nodes of an ONNX graph, each run by ONNX Runtime as a model of its own.

The results have the dtypes that the file gives them. Where ONNX Runtime has no kernel for a low
dtype, the node runs in FP32 and the results are rounded. Equal nodes share a session.

Only tensors go in and out. A sequence of them, which some translations build up in a loop, is made
anew wherever it is read: its makers run in one model with the reader (`_unit`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.validate.onnx.sessions import Session

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@functools.cache
def _low() -> dict[int, torch.dtype]:
    """The low dtypes by ONNX's numbers of them."""
    import onnx_ir as ir

    return {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


def reads(node: ir.Node) -> list[ir.Value]:
    """The tensors that a node is run with, each once: its inputs first, then what its subgraphs
    take from outside. In place of a sequence come the tensors that it is made of."""
    unit = _unit(node)
    made = {value for each in unit for value in each.outputs}
    return list(dict.fromkeys(v for each in reversed(unit) for v in _inputs(each) if v not in made))


def _unit(node: ir.Node) -> list[ir.Node]:
    """A node and those that make the sequences that it reads, in the order of the graph."""
    makers = (v.producer() for v in _inputs(node) if not _is_tensor(v))
    before = (each for maker in makers if maker is not None for each in _unit(maker))
    return list(dict.fromkeys((*before, node)))


def _is_tensor(value: ir.Value) -> bool:
    import onnx_ir as ir

    return not isinstance(value.type, ir.SequenceType | ir.OptionalType)


def _inputs(node: ir.Node) -> list[ir.Value]:
    import onnx_ir as ir

    found = dict.fromkeys(value for value in node.inputs if value is not None)
    inner: set[ir.Value] = set()
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            inner.update(graph.inputs, graph.initializers.values())
            for each in ir.traversal.RecursiveGraphIterator(graph):
                inner.update(each.outputs)
                found |= dict.fromkeys(value for value in each.inputs if value is not None)
            found |= dict.fromkeys(graph.outputs)
    return [value for value in found if value not in inner]


def is_low(value: ir.Value | None) -> bool:
    """Whether a value's dtype is a low one."""
    return value is not None and value.dtype is not None and int(value.dtype) in _low()


def constant(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A stored tensor; BF16, which NumPy does not have, by its bits."""
    array = np.array(tensor.numpy())
    if tensor.dtype.name == "BFLOAT16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Kernels:
    """Runs single nodes. Raises what ONNX Runtime raises for one that it cannot run at all."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = dict(opsets)
        self._sessions: dict[bytes, tuple[Session, bool]] = {}

    def run(
        self, node: ir.Node, given: Callable[[ir.Value], torch.Tensor]
    ) -> dict[ir.Value, torch.Tensor]:
        """The tensors that `node` makes, where `given` has those that it `reads`."""
        outputs = _made(node)
        if not outputs:
            return {}
        tensors = [given(value) for value in reads(node)]
        session, is_wide = self._session(node, [number(t.dtype) for t in tensors])
        if is_wide:
            tensors = [t.float() if t.dtype in LOW_DTYPES else t for t in tensors]
        results = zip(outputs, session.run(tensors), strict=True)
        if not is_wide:
            return dict(results)
        return {v: t.to(_low().get(int(v.dtype or 0), t.dtype)) for v, t in results}

    def _session(self, node: ir.Node, inputs: Sequence[int]) -> tuple[Session, bool]:
        import onnx_ir as ir

        key = self._model(node, inputs).SerializeToString(deterministic=True)
        if key not in self._sessions:
            try:
                self._sessions[key] = Session(key), False
            except Exception:  # noqa: BLE001  there is no kernel: its errors have no common class
                wide = self._model(
                    node, [ir.DataType.FLOAT if i in _low() else i for i in inputs], wide=True
                )
                self._sessions[key] = Session(wide.SerializeToString()), True
        return self._sessions[key]

    def _model(
        self, node: ir.Node, inputs: Sequence[int], *, wide: bool = False
    ) -> onnx.ModelProto:
        """A model of `node` alone; `inputs` are the dtypes of what it reads."""
        import onnx_ir as ir
        from onnx import helper

        unit = _unit(node)
        protos = [ir.serde.serialize_node(each) for each in unit]
        names: dict[str, str] = {}
        if len(unit) == 1:  # equal nodes get equal names
            names = {value.name or "": f"in_{i}" for i, value in enumerate(node.inputs) if value}
            names |= {value.name or "": f"out_{i}" for i, value in enumerate(node.outputs)}
        for proto in protos:
            for field in ("name", "doc_string", "metadata_props"):
                proto.ClearField(field)
            proto.input[:] = [name and names.get(name, name) for name in proto.input]
            proto.output[:] = [name and names.get(name, name) for name in proto.output]
            if wide:
                _widen(proto)
        read = [names.get(value.name or "", value.name or "") for value in reads(node)]
        results = []
        for value in _made(node):
            dtype = int(value.dtype or 0)
            dtype = ir.DataType.FLOAT if wide and dtype in _low() else dtype
            results.append((names.get(value.name or "", value.name or ""), dtype))
        graph = helper.make_graph(
            protos,
            "node",
            [helper.make_tensor_value_info(*v, None) for v in zip(read, inputs, strict=True)],
            [helper.make_tensor_value_info(*v, None) for v in results],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _made(node: ir.Node) -> list[ir.Value]:
    """The tensors that a node makes and something may read."""
    return [value for value in node.outputs if value.name and _is_tensor(value)]


def number(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype."""
    from onnx import TensorProto, helper

    if dtype == torch.bfloat16:
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype))


def _widen(proto: Any) -> None:
    """Have FP32 where the node's attributes name a low dtype."""
    from onnx import AttributeProto, TensorProto, numpy_helper

    for attribute in proto.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in _low():
            attribute.i = TensorProto.FLOAT
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in _low():
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(array))
