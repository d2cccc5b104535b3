"""`len(x)` of a tensor, while a model is traced.

Python lets `len` give nothing but a plain number, so that tracing fixes the first size of every
tensor whose length is asked for. In the modules of the user's code it is `x.shape[0]` meanwhile.

Code may ask what kind of number that is, or look it up: then the graph is another model. So where
the eager model shows a difference, the model is traced once more with plain numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class _Len:
    """What stands for `len`."""

    opens = True

    def __call__(self, value: Any) -> Any:
        opens = self.opens and isinstance(value, torch.Tensor) and value.dim()
        return value.shape[0] if opens else len(value)


_len = _Len()


def opens() -> bool:
    """Whether lengths of tensors are left open."""
    return _len.opens


@contextlib.contextmanager
def plain_numbers() -> Iterator[None]:
    """While this is open, `len` is Python's."""
    _len.opens, before = False, _len.opens
    try:
        yield
    finally:
        _len.opens = before


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
