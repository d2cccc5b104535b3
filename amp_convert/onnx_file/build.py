"""A captured graph, converted or not -> an ONNX model in memory that remembers its FX nodes.

PyTorch's own exporter writes the ONNX. What it is given is the graph of the frozen model, whose
weights are in the plan's dtype already, so nothing is left for it to decide about precision:

1. The eval graph is copied (see `fitting`), and each copied node gets a mark: its name. What ONNX
   asks for beyond PyTorch is added: a normalisation has one dtype for its input, scale and bias,
   where the CPU's kernels keep FP32 parameters beside a low input; and with low borders, the inputs
   and outputs are cast. Outputs that only write the model's state are left out, since a file keeps
   none.
2. Constants are folded, and the result is traced by `torch.export` once more. The trace carries the
   marks over to the nodes that it makes, as it does through the exporter's own decompositions.
3. `torch.onnx.export` translates, without its optimiser: that would fuse across the borders
   between precisions. `passes` tidies up instead.
4. The marks are translated into metadata that stay with the file (see `labels`).

What step 3 has decomposed also gives the FP32 model's own ONNX model (see `fp32_twin`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from amp_convert.capture.captured import Region
from amp_convert.capture.export import CapturedGraph, collector_paused
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.graph_signature import Source
from amp_convert.capture.sizes.recurrent_shapes import open_lengths
from amp_convert.core import device as devices
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.mode import Mode
from amp_convert.core.random_state import preserved_rng
from amp_convert.onnx_file import fp32_twin as onnx_twin
from amp_convert.onnx_file import labels as onnx_labels
from amp_convert.onnx_file import passes as onnx_passes
from amp_convert.onnx_file.fitting import fitted
from amp_convert.onnx_file.labels import FX_KEY
from amp_convert.onnx_file.ports import (
    example_tensors,
    input_names,
    output_names,
)
from amp_convert.onnx_file.untranslated import untranslated
from amp_convert.rewrite.fold_constants import Folded
from amp_convert.rewrite.frozen_model import fold_weights, hold
from amp_convert.rewrite.insert_casts import Rewritten

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten


def unconverted(graph: CapturedGraph) -> Rewritten:
    """A captured graph as it is, in the form that a conversion has."""
    nodes = {node.name: node for node in graph.graph_module.graph.nodes}
    return Rewritten(
        captured=graph,
        graph_module=graph.graph_module,
        values=nodes,
        origins={name: name for name in nodes},
        casts=(),
        decisions={},
    )


@dataclass(frozen=True)
class OnnxProgram:
    """An ONNX model in memory; `fp32` makes that of the FP32 model, whose file nobody reads but
    for comparison: it has no labels."""

    model: ir.Model
    fp32: Callable[[], ir.Model]


def build(
    region: Region, rewritten: Rewritten, opset: int, border: torch.dtype | None = None
) -> OnnxProgram:
    """The eval graph `rewritten` of `region`, which is the whole model, as ONNX.

    With `border`, FP32 inputs and outputs have that dtype instead. Inputs and outputs are named as
    in the model. Raises UnsupportedModelError when an operator has no translation.
    """
    of_onnx = fitted(region, rewritten, border)
    folded = fold_weights(region, of_onnx)
    with _exporting(region):
        exported = _translated(region, _traced(region, folded, border), opset)
    model, program = exported.model, exported.exported_program
    assert program is not None
    onnx_labels.tie(model, onnx_labels.marks_of(program.graph, folded.graph_module.graph))
    _finish(region, model)
    onnx_labels.annotate(model, onnx_labels.labels_of(rewritten))

    def twin() -> ir.Model:
        weights = fold_weights(region, of_onnx, wide=True).tensors
        with _exporting(region):
            found = _translated(region, onnx_twin.widen(program, weights), opset).model
        _finish(region, found)
        return found

    def fp32() -> ir.Model:
        if onnx_twin.has_twin(region, rewritten):
            with contextlib.suppress(Exception):  # whatever it is, the original can be exported
                return twin()
        return fp32_model(region, opset)

    return OnnxProgram(model, fp32)


def fp32_model(region: Region, opset: int) -> ir.Model:
    """The captured eval graph of `region` as it is, as ONNX."""
    return build(region, unconverted(region.graphs[Mode.EVAL]), opset).model


def _finish(region: Region, model: ir.Model) -> None:
    onnx_passes.tidy(model, FX_KEY)
    onnx_passes.name_borders(model, input_names(region), output_names(region))


# --- step 2 --------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """The folded graph as a module of its own, called with the user's tensors alone."""

    def __init__(self, folded: Folded) -> None:
        super().__init__()
        hold(self, folded.tensors)
        self.__dict__["_runner"] = GraphRunner(folded.graph_module, folded.signature, {}, self)

    def forward(self, *tensors: torch.Tensor) -> Any:
        runner: GraphRunner = self.__dict__["_runner"]
        given = iter(tensors)
        leaves = [next(given) if leaf.shape is not None else leaf.value
                  for leaf in runner.signature.user_inputs]  # fmt: skip
        users = iter(leaves)
        inputs = [
            next(users) if spec.source is Source.USER else tensor
            for spec, tensor in zip(runner.signature.inputs, runner.tensors(), strict=True)
        ]
        return _MarkedRun(runner.graph_module).run(*inputs, enable_io_processing=False)


class _MarkedRun(fx.Interpreter):
    """Runs a graph so that what is traced meanwhile inherits the marks."""

    def run_node(self, n: fx.Node) -> Any:
        with fx_traceback.set_current_meta(n):
            return super().run_node(n)


def _traced(
    region: Region, folded: Folded, border: torch.dtype | None
) -> torch.export.ExportedProgram:
    tensors = example_tensors(region)
    if border is not None:
        tensors = [t.to(border) if t.dtype == torch.float32 else t for t in tensors]
    shapes = [
        {d: torch.export.Dim.AUTO for d, size in enumerate(leaf.shape) if size is None}
        for leaf in folded.signature.user_inputs
        if leaf.shape is not None
    ]
    graph = folded.graph_module.graph
    with fx_traceback.preserve_node_meta(), _lengths_of(graph):
        program = torch.export.export(
            _Flat(folded), tuple(tensors), dynamic_shapes=(tuple(shapes),), strict=False
        )
        # Running it once fixes the lengths that its translation will.
        return program.run_decompositions({}) if _is_unrolled(graph) else program


# --- step 3 --------------------------------------------------------------------------------------


def _translated(
    region: Region, program: torch.export.ExportedProgram, opset: int
) -> torch.onnx.ONNXProgram:
    """What PyTorch's exporter makes of a program, its constants folded."""
    try:
        with _lengths_of(program.graph):
            exported = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False, opset_version=opset
            )
    except Exception as error:
        raise untranslated(region, error) from error
    assert exported is not None
    if exported.model.opset_imports[""] != opset:
        raise UnsupportedModelError(
            f"this model cannot be written for ONNX opset {opset}",
            mend=f"Ask for opset {exported.model.opset_imports['']}.",
        )
    _fix_numbers(exported.model.graph)
    exported.rename_axes(_axes(exported.model.graph.inputs, input_names(region)))
    onnx_passes.fold_constants(exported.model)
    return exported


def _lengths_of(graph: fx.Graph) -> contextlib.AbstractContextManager[None]:
    """Around a trace and its translation: lengths stay open where the exporter keeps each recurrent
    layer whole."""
    return contextlib.nullcontext() if _is_unrolled(graph) else open_lengths()


def _is_unrolled(graph: fx.Graph) -> bool:
    """Whether the exporter writes the steps of a recurrent layer one by one, as it does of an RNN,
    and not of LSTM and GRU."""
    unrolled = {aten.rnn_tanh.input, aten.rnn_relu.input}
    return any(node.target in unrolled for node in graph.nodes)


@contextlib.contextmanager
def _exporting(region: Region) -> Iterator[None]:
    """No gradients, no draws from the user's generators, no warnings about the exporter's own
    affairs, and no garbage collection."""
    generators = preserved_rng(devices.of_model(region.module))
    with collector_paused(), _quiet(), torch.no_grad(), generators:
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about the exporter's own affairs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fix_numbers(graph: ir.Graph) -> None:
    """Sizes that are numbers, where PyTorch writes them as names: "5" for a size that a trace has
    fixed since its input was declared."""
    for value in (*graph.inputs, *graph.outputs):
        for d, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size.value).isdecimal():
                assert value.shape is not None
                value.shape[d] = int(str(size.value))


def _axes(inputs: Sequence[ir.Value], names: Sequence[str]) -> dict[str | ir.SymbolicDim, str]:
    """Names for the sizes that may vary: of first dimensions "batch", or one a size where inputs
    need not agree; of others one by the input and the dimension that have it first."""
    found: dict[str | ir.SymbolicDim, str] = {}
    for value, name in zip(inputs, names, strict=True):
        for d, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                found.setdefault(str(size.value), f"{name}_dim_{d}" if d else f"{name}_batch")
    batches = [size for size, name in found.items() if name.endswith("_batch")]
    return {**found, **(dict.fromkeys(batches, "batch") if len(batches) == 1 else {})}
