"""The original's signature on the `forward` of a model that stands in for it.

`torch.jit.trace` by keyword, transformers' Trainer and others ask `inspect.signature` which inputs
a model takes. An attribute of the instance would not outlive a copy; so the instance gets a class
of its own, as `torch.fx.GraphModule` does it, with a `forward` that differs in its signature alone.
"""

from __future__ import annotations

import inspect
from functools import update_wrapper
from types import FunctionType

from torch import nn


def show(model: nn.Module, call: inspect.Signature) -> None:
    """Let `inspect.signature(model.forward)` be `call`. Files and copies do not keep the class:
    whoever makes them calls this anew."""
    base = type(model)
    source = base.forward
    forward = FunctionType(source.__code__, source.__globals__, source.__name__)
    update_wrapper(forward, source)
    del forward.__wrapped__  # type: ignore[attr-defined]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = call.replace(parameters=[own, *call.parameters.values()])
    forward.__signature__ = shown  # type: ignore[attr-defined]
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    model.__class__ = type(base.__name__, (base,), {**names, "forward": forward})
