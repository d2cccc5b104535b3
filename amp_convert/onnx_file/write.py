"""ConvertedModel -> an ONNX file with the plan's precision in every node.

`build` builds the model. Here it is written: beside its destination first, where ONNX's own
checker goes through it with full shape and type inference, and then renamed into place, so that no
run that fails or is killed leaves half a file. Weights go into a second file, `<name>.data`, on
request and when there are too many of them for one: a protobuf ends at 2 GiB. Then the old model is
taken away before the data are replaced, since it would read the new ones as its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from amp_convert import __version__
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.core.files.atomic_files import replacing
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.core.optional_packages import require
from amp_convert.onnx_file import build as onnx_program
from amp_convert.onnx_file.ports import written_state
from amp_convert.rewrite.converted_model import ConvertedModel

if TYPE_CHECKING:
    import onnx_ir as ir

IoTypes = Literal["keep", "low"]
"""Dtypes of inputs and outputs: FP32 as in the original, or the plan's low dtype."""

DEFAULT_OPSETS: Mapping[str, int] = {"float16": 20, "bfloat16": 22}
"""The first opsets in which whatever PyTorch's exporter writes is defined for the dtype: GELU is
one operator from 20 on, convolution and pooling take BF16 from 22 on."""
OPSETS = range(18, 24)
"""Those that PyTorch's exporter can write."""

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights from which on they get a file of their own."""

_PACKAGES = ("onnx", "onnxscript")
_NAMES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class OnnxTensor:
    """An input or output. A size that may vary is given by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file that was written, and what is in it. Plain data.

    `bytes` counts the weights in `external_data`, a file beside `path`, as well. `casts` are those
    from one floating point dtype to another; `nodes_by_dtype` counts nodes by the dtype of their
    first result. `lost_state` names the buffers and inputs that the model writes to, which a file
    cannot do.
    """

    path: str
    external_data: str | None
    bytes: int
    dtype: str
    io_types: IoTypes
    opset: int
    producer: str
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    nodes: int
    casts: int
    nodes_by_dtype: Mapping[str, int]
    lost_state: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """A file that was written; `fp32` makes the FP32 model's own ONNX model, to compare with."""

    file: OnnxModel
    fp32: Callable[[], ir.Model]


def export_onnx(
    converted: ConvertedModel,
    path: str | PathLike[str],
    *,
    io_types: IoTypes = "keep",
    opset: int | None = None,
    external_data: bool = False,
) -> OnnxModel:
    """Write the eval graph of `converted` to `path` as ONNX.

    Inputs and outputs have the names and order that they have in the model, and FP32 where the
    model has it; with `io_types="low"` the plan's dtype. The batch size stays free where it is
    free in the captured graph. `opset` is by default the first that has all it takes.

    Raises UsageError for wrong arguments and missing packages; UnsupportedModelError when the model
    was captured in parts, or when ONNX has no expression for it in that opset.
    """
    return export(converted, path, io_types, opset, external_data=external_data).file


def export(
    converted: ConvertedModel,
    path: str | PathLike[str],
    io_types: IoTypes = "keep",
    opset: int | None = None,
    *,
    external_data: bool = False,
) -> Exported:
    """`export_onnx`, and what validation needs beside the file."""
    require("onnx", *_PACKAGES)
    converted.heed_hooks()
    target, dtype = _checked_path(path), converted.plan.dtype
    opset = DEFAULT_OPSETS[dtype] if opset is None else opset
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} cannot be written", mend=f"Use {OPSETS[0]} to {OPSETS[-1]}."
        )
    if io_types not in ("keep", "low"):
        raise UsageError(f"io_types is {io_types!r}", mend='Use "keep" or "low".')
    if not converted.captured.is_whole:
        first = converted.captured.uncaptured[0]
        raise UnsupportedModelError(
            "ONNX takes a whole model, and only parts of this one could be captured: "
            f"{first.reason}",
            where=first.location,
            mend=first.mend,
        )
    region = converted.captured.regions[0]
    border = from_name(dtype) if io_types == "low" else None
    program = onnx_program.build(region, converted.rewritten[region.path][Mode.EVAL], opset, border)
    model = program.model
    data = write(model, target, external_data=external_data)
    file = OnnxModel(
        path=str(target),
        external_data=data.name if data else None,
        bytes=sum(part.stat().st_size for part in (target, data) if part is not None),
        dtype=dtype,
        io_types=io_types,
        opset=opset,
        producer=f"{model.producer_name} {model.producer_version}",
        inputs=tuple(_described(value) for value in model.graph.inputs),
        outputs=tuple(_described(value) for value in model.graph.outputs),
        nodes=len(model.graph),
        casts=sum(_is_float_cast(node) for node in model.graph),
        nodes_by_dtype=dict(Counter(_dtype(node.outputs[0]) for node in model.graph).most_common()),
        lost_state=written_state(region),
    )
    return Exported(file, program.fp32)


def write(
    model: ir.Model, target: Path, *, external_data: bool = False, check: bool = True
) -> Path | None:
    """Check the model and write it to `target`; the path of its external data, if there are any."""
    import onnx
    import onnx_ir as ir

    model.producer_name = "amp-convert"
    model.producer_version = f"{__version__} with PyTorch {torch.__version__}"
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = external_data or weights > EXTERNAL_ABOVE
    data = f"{target.name}.data"
    with replacing(target) as draft:
        ir.save(model, draft, external_data=data if external else None)
        try:
            if check:
                onnx.checker.check_model(str(draft), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise UnsupportedModelError(
                f"ONNX opset {model.opset_imports['']} has no such model: {_last_line(error)}",
                mend=f"Try a later opset, up to {OPSETS[-1]}.",
            ) from error
        if external:
            target.unlink(missing_ok=True)
            os.replace(draft.with_name(data), target.with_name(data))
    return target.with_name(data) if external else None


def _checked_path(path: str | PathLike[str]) -> Path:
    target = Path(path)
    if target.is_dir() or not target.name:
        raise UsageError(f"{target} is a folder", mend="Give the name of a file.")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", mend="Make it first.")
    return target


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removesuffix(".") if lines else type(error).__name__


def _described(value: ir.Value) -> OnnxTensor:
    sizes = () if value.shape is None else tuple(value.shape)
    shape = tuple(size if isinstance(size, int) else str(size) for size in sizes)
    return OnnxTensor(value.name or "", _dtype(value), shape)


def _dtype(value: ir.Value | None) -> str:
    """PyTorch's name of a value's dtype; "" where it is not known or the value is no tensor."""
    name = value.dtype.name.lower() if value is not None and value.dtype is not None else ""
    return _NAMES.get(name, name)


def _is_float_cast(node: ir.Node) -> bool:
    ends = (node.inputs[0], node.outputs[0]) if node.op_type == "Cast" else ()
    return bool(ends) and all("float" in _dtype(end) for end in ends)
