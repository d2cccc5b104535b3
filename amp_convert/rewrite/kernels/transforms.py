"""Whether somebody transforms the call at hand: what is tuned for a plain call is not for these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def autocast_off(inputs: Iterable[Any]) -> Iterator[None]:
    """No autocast of the caller's on the devices of `inputs`: what the plan has decided, none other
    may decide again."""
    devices = {"cpu", *(x.device.type for x in inputs if isinstance(x, torch.Tensor))}
    with contextlib.ExitStack() as off:
        for device in sorted(devices - {"meta"}):
            off.enter_context(torch.autocast(device, enabled=False))
        yield
