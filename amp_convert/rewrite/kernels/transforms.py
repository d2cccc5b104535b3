"""Whether somebody transforms the call at hand: what is tuned for a plain call is not for these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether `torch.func` transforms the call, whose tensors hide how many values they hold."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_plain_call() -> bool:
    """Whether tensors are computed and nothing else is done: no compiler or tracer listens, nobody
    transforms, and no derivative is carried forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_transformed()
        or forward_ad._current_level >= 0
    )


def autocasting(inputs: Iterable[Any]) -> tuple[str, ...]:
    """The devices of `inputs` whose autocast is on."""
    devices = {x.device.type for x in inputs if isinstance(x, torch.Tensor)} - {"meta"}
    return tuple(sorted(device for device in devices if torch.is_autocast_enabled(device)))
