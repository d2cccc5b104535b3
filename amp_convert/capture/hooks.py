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


def hook_counts(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """How many forward hooks each submodule has, by path; the model itself left out."""
    return {
        path: (module, sum(len(getattr(module, name)) for name in _HOOKS))
        for path, module in model.named_modules()
        if path
    }
