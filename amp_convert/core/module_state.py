"""What a model holds, for a call that is to leave it as it was: its tensors, and what it keeps in
plain attributes, such as a hidden state or a cache.

Buffers are put back anyway. An attribute that one call sets and the next one reads would make each
arm of a comparison begin where the one before it ended, with values of its precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def other_tensors(
    model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """While this is open, each parameter and buffer of a model is what `change` makes of it: one
    for each tensor, whatever names it has. Afterwards its tables are as they were.

    `torch.func.functional_call` does the same, but leaves its own tensors in a module that two
    paths lead to (seen with PyTorch 2.13).
    """
    tables: list[Any] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    before = [(table, dict(table.items())) for table in tables]
    made: dict[int, torch.Tensor] = {}
    try:
        for table, kept in before:
            for name, tensor in kept.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = change(tensor)
                    table[name] = made[id(tensor)]
        yield
    finally:
        for table, kept in before:
            for name in [name for name in dict(table.items()) if name not in kept]:
                del table[name]
            for name, tensor in kept.items():
                table[name] = tensor


_OWN = frozenset(nn.Module().__dict__)
"""What every module has: flags, tables of parts and hooks."""
_OURS = __name__.partition(".")[0]


class Attributes:
    """The attributes of all modules of a model at one moment. Tensors are kept with their values,
    lists, dicts and sets with what they hold, anything else as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (path, module, {n: (v, _copied(v)) for n, v in _own_attributes(module).items()})
            for path, module in model.named_modules()
            if type(module).__module__.partition(".")[0] != _OURS
            and not isinstance(module, torch.jit.ScriptModule)
        ]

    def changed(self) -> tuple[str, ...]:
        """The names of those that are others now, "layer.h"."""
        found = []
        for path, module, kept in self._kept:
            now = _own_attributes(module)
            names = [name for name in now if name not in kept]
            names += [n for n, (v, c) in kept.items() if now.get(n) is not v or _differs(v, c)]
            found += [f"{path}.{name}".lstrip(".") for name in names]
        return tuple(found)

    def restore(self) -> None:
        """Put all of them back."""
        for _, module, kept in self._kept:
            for name in _own_attributes(module).keys() - kept.keys():
                del module.__dict__[name]
            for name, (value, copy) in kept.items():
                module.__dict__[name] = value
                if _differs(value, copy):
                    _write_back(value, copy)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in module.__dict__.items() if n not in _OWN and n != "forward"}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if _has_values(value) else None
    return value.copy() if type(value) in (list, dict, set) else None


def _differs(value: Any, copy: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return copy is not None and not torch.equal(value, copy)
    if type(value) is list:
        return len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True))
    if type(value) is dict:
        return value.keys() != copy.keys() or any(value[k] is not copy[k] for k in copy)
    return type(value) is set and value != copy


def _write_back(value: Any, copy: Any) -> None:
    if isinstance(value, torch.Tensor):
        if copy is not None:
            with torch.no_grad():
                value.detach().copy_(copy)
    elif type(value) is list:
        value[:] = copy
    elif type(value) in (dict, set):
        value.clear()
        value.update(copy)


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and type(tensor) is torch.Tensor
