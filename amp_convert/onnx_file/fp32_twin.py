"""The FP32 twin of a low-precision ONNX model, without tracing the FP32 model once more.

How far ONNX Runtime and PyTorch are apart without any conversion is known from an FP32 file. To
export the original again would take as long as the export of the converted model, nearly all of it
tracing and decomposing. Instead the program that the exporter has made of the converted model, with
its operators decomposed already, is taken as it is with every low dtype in it replaced by FP32, and
given the weights as they were before they were rounded; then its casts are casts from FP32 to FP32,
and are tidied away. Factors that the plan adds are powers of two, and change no bit.

Two kinds of model have no such twin. In one that has low-precision values of its own, those belong
to the original. And a mask that the plan clamps is another number in FP32 too: a row that is masked
as a whole forgets its scores at -1e9, and not at what FP16 can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Region, Value
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import LOW_DTYPES, widened
from amp_convert.rewrite.insert_casts import Rewritten


def has_twin(region: Region, rewritten: Rewritten) -> bool:
    """Whether the eval graph `rewritten` of `region` computes in FP32 what the original does."""
    clamped = any(decision.clamp is not None for decision in rewritten.decisions.values())
    return not clamped and not _holds_low(region)


def _holds_low(region: Region) -> bool:
    """Whether the FP32 model itself has a value in a low dtype, be it in a branch of `cond`."""
    recorded = pytree.tree_leaves(list(region.traces[Mode.EVAL].values.values()))
    named = [
        leaf
        for node in _all_nodes(region.graphs[Mode.EVAL].graph_module)
        for leaf in pytree.tree_leaves((node.args, node.kwargs))
    ]
    dtypes = [value.dtype for value in recorded if isinstance(value, Value)] + named
    return any(dtype in LOW_DTYPES for dtype in dtypes if isinstance(dtype, torch.dtype))


def widen(
    program: torch.export.ExportedProgram, weights: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """Make `program`, which is decomposed, compute in FP32, with `weights` for its state.

    It is changed in place. Asked to decompose itself, it gives itself.
    """
    for node in _all_nodes(program.graph_module):
        node.args, node.kwargs = widened((node.args, node.kwargs))
        node.meta = {**node.meta, "val": pytree.tree_map(_wide, node.meta.get("val"))}
    program.state_dict.update(weights)
    program.constants.update({n: _wide(t) for n, t in program.constants.items()})
    program.run_decompositions = lambda *_: program
    return program


def _all_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Those of subgraphs, too."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _wide(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in LOW_DTYPES
    return value.to(torch.float32) if low else value
