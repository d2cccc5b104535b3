"""Exported files of the zoo's models, one a process, and how the tests read ONNX files."""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

from amp_convert.core.tree_paths import named_leaves
from amp_convert.onnx_file.write import Exported, IoTypes, OnnxModel, export
from tests.zoo import BUILDERS, converted, example

EXPORTABLE = [name for name in BUILDERS if name != "mixtral"]
"""All but the one whose FP32 original PyTorch cannot export: its experts are a custom operator."""


def exportable(*names: str) -> pytest.MarkDecorator:
    """Runs a test on each of these models; one process has all tests of a model."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=[
                    pytest.mark.xdist_group(name),
                    *([pytest.mark.slow] if name != "cnn" else []),
                ],
            )
            for name in names
        ],
    )


every_exportable = exportable(*EXPORTABLE)

ELEMENTS = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="amp_convert_onnx_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def exported(
    name: str,
    dtype: torch.dtype = torch.float16,
    rules: str = "default",
    io_types: IoTypes = "keep",
) -> OnnxModel:
    """A model of the zoo, written once a process."""
    return _exported(name, dtype, rules, io_types).file


def fp32_twin(name: str, dtype: torch.dtype = torch.float16) -> ir.Model:
    """The FP32 model that `exported` gives beside such a file."""
    return _exported(name, dtype, "default", "keep").fp32()


@functools.cache
def _exported(name: str, dtype: torch.dtype, rules: str, io_types: IoTypes) -> Exported:
    path = _folder() / f"{name}-{dtype}-{rules}-{io_types}.onnx"
    return export(converted(name, rules, dtype), path, io_types)


def read(model: OnnxModel) -> onnx.ModelProto:
    """The file, with the types that ONNX itself infers from its operators."""
    return onnx.shape_inference.infer_shapes(onnx.load(model.path), strict_mode=True)


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of each value by name."""
    graph = proto.graph
    found = {v.name: v.type.tensor_type.elem_type
             for v in (*graph.input, *graph.output, *graph.value_info)}  # fmt: skip
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def props(item: Any) -> dict[str, str]:
    """The metadata of a node or value."""
    return {entry.key: entry.value for entry in item.metadata_props}


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def run(model: OnnxModel, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX Runtime makes of the file, unoptimised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def tensor_leaves(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of nested outputs by the names that reports give them."""
    return {name: leaf for name, leaf in named_leaves(tree) if isinstance(leaf, torch.Tensor)}


def ordered_inputs(name: str) -> dict[str, torch.Tensor]:
    """The example inputs of a model of the zoo, in the order of its `forward`."""
    model, args, kwargs = example(name)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)
