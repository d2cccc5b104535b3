"""The FP32 twin of a low-precision ONNX model, without tracing the FP32 model once more.

How far ONNX Runtime and PyTorch are apart without any conversion is known from an FP32 file. To
export the original again would take as long as the export of the converted model, nearly all of it
tracing and decomposing. Instead the program that the exporter has made of the converted model, with
its operators decomposed already, is taken as it is with every low dtype in it replaced by FP32, and
given the weights as they were before they were rounded; then its casts are casts from FP32 to FP32,
and are tidied away. What the plan adds beside casts does nothing to FP32 numbers: clamps at the
borders of the low dtype, which a mask is beyond, and factors that are powers of two.

A model that has low-precision values of its own has no such twin: they belong to the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture import Region, Value
from amp_convert.dtypes import LOW_DTYPES, widened


def holds_low(region: Region) -> bool:
    """Whether the FP32 model itself has a value in a low dtype in eval mode."""
    recorded = pytree.tree_leaves(list(region.traces["eval"].values.values()))
    return any(isinstance(v, Value) and v.dtype in LOW_DTYPES for v in recorded)


def widen(
    program: torch.export.ExportedProgram, weights: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """Make `program`, which is decomposed, compute in FP32, with `weights` for its state.

    It is changed in place. Asked to decompose itself, it gives itself.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.args, node.kwargs = widened((node.args, node.kwargs))
            node.meta = {**node.meta, "val": pytree.tree_map(_wide, node.meta.get("val"))}
    program.state_dict.update(weights)
    program.constants.update({n: _wide(t) for n, t in program.constants.items()})
    program.run_decompositions = lambda *_: program
    return program


def _wide(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in LOW_DTYPES
    return value.to(torch.float32) if low else value
