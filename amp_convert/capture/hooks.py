"""Forward hooks around captured parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

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
    return {path: _hooks(module) for path, module in _submodules(model)}


class HookWatch:
    """Tells which submodules of a model have other forward hooks than the `known` ones. It is asked
    at each call of a converted model, so it keeps the modules at hand."""

    def __init__(self, model: nn.Module, known: Mapping[str, frozenset[int]]) -> None:
        self._modules = [(path, module, known.get(path)) for path, module in _submodules(model)]

    def changed(self) -> frozenset[str]:
        """The paths of these submodules."""
        return frozenset(
            path
            for path, module, known in self._modules
            if (known or module._forward_hooks or module._forward_pre_hooks)
            and _hooks(module) != known
        )


def _hooks(module: nn.Module) -> frozenset[int]:
    return frozenset(number for name in _HOOKS for number in getattr(module, name))


def _submodules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((p, m) for p, m in model.named_modules(remove_duplicate=False) if p)


@contextlib.contextmanager
def unheard(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The hooks of these submodules off: a capture is no call of the user's."""
    with contextlib.ExitStack() as off:
        for module in {id(m): m for m in map(model.get_submodule, paths)}.values():
            off.enter_context(own_hooks_off(module))
        yield
