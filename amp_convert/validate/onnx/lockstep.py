"""An ONNX graph and the PyTorch graph that it was exported from, run side by side, node by node.

ONNX Runtime hides roundings: see `sessions`. So each ONNX node runs here as a model of its
own, and its results have the dtype that the file gives them before anything else reads them: an
overflow in FP16 is an overflow, whatever the provider does inside of an operator. Where ONNX
Runtime has no kernel for a dtype (BF16 on a CPU), the node runs in FP32 and its results are
rounded. Equal nodes share a session.

At each FX node three results meet, as where inference is validated: the reference, which is the
frozen PyTorch model's; the accumulated one, from ONNX nodes fed by ONNX nodes; and the local one,
from those ONNX nodes that this FX node became, fed with PyTorch's values. An FX node that became
none, since it passes on what it gets (a cast to the dtype that is there already), is recognised by
its bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from amp_convert.onnx_file.labels import FX_KEY
from amp_convert.rewrite.graph_execution import GraphExecution
from amp_convert.validate.onnx.node_kernels import Kernels, constant, is_low, number, reads

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class OnnxNodeValues:
    """What an FX node of this name gave. `local` is None where it has no ONNX node of its own;
    `given_abs_max` is the largest magnitude among the numbers that the local result was made of,
    for results in FP32: low ones are judged by their own rounding."""

    name: str
    reference: torch.Tensor
    accumulated: torch.Tensor
    local: torch.Tensor | None
    given_abs_max: float


class OnnxLockstep:
    """Runs batches through both graphs: the model in an exported file, and the graph of the frozen
    PyTorch model."""

    def __init__(self, model: ir.Model, graph_module: fx.GraphModule) -> None:
        self._graph, self._module = model.graph, graph_module
        self._kernels = Kernels(model.opset_imports)
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            self._nodes.setdefault(node.metadata_props.get(FX_KEY, ""), []).append(node)
        self._results = {
            name: value
            for node in model.graph
            for value in node.outputs
            for name in value.metadata_props.get(FX_KEY, "").split()
        }

    def run(
        self,
        fx_inputs: Sequence[Any],
        onnx_inputs: Sequence[torch.Tensor],
        visit: Callable[[OnnxNodeValues], None],
    ) -> list[torch.Tensor]:
        """The ONNX outputs for one batch; `visit` is called in the order of the FX graph for each
        node whose result is a floating point tensor and is in the ONNX graph."""
        arm, results = GraphExecution(self._module, fx_inputs), dict(self._results)
        state = _Values(self._graph, onnx_inputs, self._kernels, Counter(results.values()))
        for node in self._module.graph.nodes:
            arm.execute(node)
            for each in self._nodes.get(node.name, ()):
                state.compute(each)
            value = arm.values[node]
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                found = results.get(node.name) or _passed_on(node, arm, results)
                if found is not None and state.has(found):
                    results[node.name] = found
                    if value.is_floating_point() and value.numel():
                        local, largest = self._local(node.name, arm, state, results)
                        own = state.get(found)
                        visit(OnnxNodeValues(node.name, value.cpu(), own, local, largest))
            if node.op != "output":
                arm.free()
                state.free(self._results.get(node.name))
        for value in self._graph.outputs:
            producer = value.producer()
            if producer is not None:  # a border that the FX graph does not have
                state.compute(producer)
        return [state.get(value) for value in self._graph.outputs]

    def _local(
        self, name: str, arm: GraphExecution, state: _Values, results: Mapping[str, ir.Value]
    ) -> tuple[torch.Tensor | None, float]:
        """The result of the FX node's own ONNX nodes, fed with PyTorch's values, and the largest
        magnitude among those."""
        nodes, result = self._nodes.get(name, ()), results[name]
        if result.producer() not in nodes:
            return None, 0.0
        known = {
            results[node.name]: value
            for node, value in arm.values.items()
            if node.name in results
            and node.name != name
            and isinstance(value, torch.Tensor)
            and number(value.dtype) == results[node.name].dtype  # complex numbers are pairs there
        }

        made: dict[ir.Value, torch.Tensor] = {}
        largest = 0.0

        def given(value: ir.Value) -> torch.Tensor:
            nonlocal largest
            if value in made:
                return made[value]
            tensor = known[value].cpu() if value in known else state.get(value)
            if not is_low(result) and tensor.is_floating_point() and tensor.numel():
                finite = tensor.double().abs().nan_to_num(nan=0.0, posinf=0.0)
                largest = max(largest, float(finite.max()))
            return tensor

        for node in nodes:
            if not all(v in made or v in known or state.has(v) for v in reads(node)):
                return None, 0.0
            made |= self._kernels.run(node, given)
        return made[result], largest


def _passed_on(
    node: fx.Node, arm: GraphExecution, results: Mapping[str, ir.Value]
) -> ir.Value | None:
    """The ONNX value of the input that this FX node passes on, if it does."""
    value = arm.values[node]
    for source in node.all_input_nodes:
        given = arm.values[source]
        if (
            source.name in results
            and isinstance(given, torch.Tensor)
            and (given.dtype, given.shape) == (value.dtype, value.shape)
            and torch.equal(given, value)
        ):
            return results[source.name]
    return None


class _Values:
    """The values of an ONNX graph that something will still read. `extra` counts readers that are
    no ONNX nodes."""

    def __init__(
        self,
        graph: ir.Graph,
        inputs: Sequence[torch.Tensor],
        kernels: Kernels,
        extra: Counter[ir.Value],
    ) -> None:
        self._kernels = kernels
        self._values = dict(zip(graph.inputs, inputs, strict=True))
        self._readers = extra + Counter(graph.outputs)
        for node in graph:
            self._readers.update(reads(node))
        self._done: set[ir.Node] = set()
        self._spent: list[ir.Value] = []

    def has(self, value: ir.Value) -> bool:
        return value in self._values or value.const_value is not None

    def get(self, value: ir.Value) -> torch.Tensor:
        """A constant, an input, or a result that was computed."""
        if value.const_value is not None:
            return constant(value.const_value)
        return self._values[value]

    def compute(self, node: ir.Node) -> None:
        """Compute a node, after those whose results it reads."""
        pending = [node]
        while pending:
            current = pending[-1]
            producers = (value.producer() for value in reads(current))
            missing = [p for p in producers if p is not None and p not in self._done]
            if missing:
                pending += missing
                continue
            pending.pop()
            if current not in self._done:
                self._values |= self._kernels.run(current, self.get)
                self._done.add(current)
                self._spent += reads(current)

    def free(self, seen: ir.Value | None) -> None:
        """Drop what was read for the last time since this was called before; `seen` is the value
        that was looked at in between."""
        for value in (*self._spent, *([seen] if seen is not None else [])):
            self._readers[value] -= 1
            if not self._readers[value]:
                self._values.pop(value, None)
        self._spent.clear()
