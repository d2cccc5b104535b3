"""What the model's own casts ask for, once the model is not in FP32.

`x.to(y.dtype)` and `x.to(torch.float32)` are one thing to a trace of an FP32 model. To its author
they are not: the first goes back to the dtype that the model works in, the second insists on FP32.
To tell them apart, the eager model runs twice more, all of it in a low dtype and under autocast,
and the result of each cast is written down, line by line of the `forward` around it and in order.

A cast of the trace is then looked up by its line and its place among that line's casts. Where a
line has another number of casts than it had in the trace, or where the model does not run in that
form, nothing is known, and the cast counts as insisting on FP32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture.export_repairs import patched_methods
from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.node_info import is_library_frame, user_frame
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.module_state import other_tensors
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.core.random_state import preserved_rng

aten = torch.ops.aten

Line = tuple[str, int]
"""A file and a line in it."""


@dataclass(frozen=True)
class CastWord:
    """Whether a cast gives a low dtype in a model that is all low, and under autocast."""

    all_low: bool
    autocast: bool


Words = Mapping[Line, list[CastWord]]

_METHODS = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "byte", "char", "short",
    "int", "long", "cpu", "cuda",
)  # fmt: skip
_TRACED = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
}  # fmt: skip


def cast_words(
    model: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any], mode: Mode
) -> Words:
    """What each cast of one call in `mode` asks for, by line. Leaves the model as it is."""
    inputs = (tuple(args), dict(kwargs))
    low = _heard(model, inputs, _all_low, mode)
    native = _heard(model, inputs, _under_autocast, mode)
    return {
        line: [
            CastWord(*pair)
            for pair in zip(
                low.get(line, [False] * len(native.get(line, ()))),
                native.get(line, [False] * len(low.get(line, ()))),
                strict=False,
            )
        ]
        for line in {*low, *native}
        if line not in low or line not in native or len(low[line]) == len(native[line])
    }


def words_of(nodes: Iterable[fx.Node], words: Callable[[], Words]) -> dict[fx.Node, CastWord]:
    """What is known of each cast of a trace that was not decomposed yet; `words` is asked only
    where there is one."""
    lines: dict[Line, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_function" and node.target in _TRACED:
            frame = user_frame(node.meta.get("stack_trace") or "")
            if frame is not None:
                lines.setdefault(frame, []).append(node)
    if not lines:
        return {}
    heard = words()
    return {
        node: word
        for line, found in lines.items()
        if len(heard.get(line, ())) == len(found)
        for node, word in zip(found, heard[line], strict=True)
    }


def _line(frame: FrameType | None) -> Line | None:
    """The innermost line of a `forward`: the frames that a trace keeps."""
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code.co_name == "forward" and not is_library_frame(file):
            return file, frame.f_lineno
        frame = frame.f_back
    return None


_Run = Callable[[nn.Module, Any, Any], Any]


def _heard(model: nn.Module, inputs: Any, run: _Run, mode: Mode) -> dict[Line, list[bool]]:
    device = devices.of_model(model)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    heard: dict[Line, list[bool]] = {}

    def listen(_: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = method(*args, **kwargs)
        line = _line(sys._getframe(2)) if isinstance(result, torch.Tensor) else None
        if line is not None:
            heard.setdefault(line, []).append(result.dtype in LOW_DTYPES)
        return result

    try:
        with (
            in_mode(model, training=mode is Mode.TRAIN),
            torch.no_grad(),
            preserved_rng(device),
            patched_methods(_METHODS, listen),
        ):
            run(model, args, kwargs)
    except Exception:  # noqa: BLE001  a model that does not run in this form says nothing
        return {}
    return heard


def _all_low(model: nn.Module, args: Any, kwargs: Any) -> Any:
    args, kwargs = pytree.tree_map_only(torch.Tensor, _lowered, (args, kwargs))
    with other_tensors(model, lambda tensor: _lowered(tensor.detach())):
        return model(*args, **kwargs)


def _under_autocast(model: nn.Module, args: Any, kwargs: Any) -> Any:
    device = devices.of_model(model)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return model(*args, **kwargs)


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype is torch.float32 else tensor
