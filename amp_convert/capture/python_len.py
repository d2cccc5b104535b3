"""`len(x)` of a tensor, while a model is traced.

Python lets `len` give nothing but a plain number, so that tracing fixes the first size of every
tensor whose length is asked for. In the modules of the user's code it is `x.shape[0]` meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else len(value)


@contextlib.contextmanager
def open_len(model: nn.Module) -> Iterator[None]:
    """While this is open, `len` of a tensor keeps its size open, in the code that the classes of
    `model` and of its parts stand in; PyTorch's own is left alone."""
    names = {cls.__module__ for part in model.modules() for cls in type(part).__mro__}
    tables = [
        vars(sys.modules[name])
        for name in sorted(names)
        if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins")
    ]
    changed = [table for table in tables if "len" not in table]
    for table in changed:
        table["len"] = _len
    try:
        yield
    finally:
        for table in changed:
            table.pop("len", None)
