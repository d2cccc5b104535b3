"""Forward hooks around captured parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def own_hooks_off(module: nn.Module) -> Iterator[None]:
    """A part is called as a module, so its own hooks run around its graph, and belong not into it;
    those of the modules inside it do."""
    tables = [getattr(module, name) for name in _HOOKS]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def hooks_of(model: nn.Module) -> dict[str, frozenset[int]]:
    """The forward hooks of each submodule, by path and by the number that PyTorch gives each hook;
    the model itself left out. A submodule with several paths is there under each."""
    return {
        path: frozenset(number for name in _HOOKS for number in getattr(module, name))
        for path, module in model.named_modules(remove_duplicate=False)
        if path
    }
