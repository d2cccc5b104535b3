"""Which layer of a model runs at this moment, for one thread.

PyTorch calls hooks that hold for all modules around each `forward`; the modules themselves are left
alone, so that nothing takes them for changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class Layers:
    """Follows `model`, or else the module that is called first. `entered` and `left` are called
    around each call that no other call of it is around, the latter with what the call gives, in
    place of which its own result is given. `widened` gives arguments in FP32."""

    def __init__(
        self,
        model: nn.Module | None,
        entered: Callable[[nn.Module, str], None],
        left: Callable[[nn.Module, Any], Any],
        widened: Callable[[Any], Any],
    ) -> None:
        self._model, self._entered, self._left = model, entered, left
        self._widened = widened
        self._paths = _paths(model) if model is not None else {}
        self._running: list[tuple[nn.Module, str]] = []
        self._handles: tuple[RemovableHandle, ...] = ()
        self._thread = 0

    def open(self) -> None:
        """Follow calls of this thread from now on."""
        self._thread = threading.get_ident()
        self._handles = (
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        )

    def close(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._running.clear()

    @property
    def layer(self) -> str:
        """The path of the innermost layer that runs; "" where it is the model itself, or none."""
        return self._running[-1][1] if self._running else ""

    @property
    def is_running(self) -> bool:
        """Whether some module runs."""
        return bool(self._running)

    @property
    def root(self) -> nn.Module | None:
        """The model, or what was taken for it."""
        return self._model

    def _before(self, module: nn.Module, args: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        if self._model is None:
            self._model, self._paths = module, _paths(module)
        path = self._paths.get(id(module))
        if path is None:  # a module of another model, or made on the way
            path = self.layer
        if module is self._model:
            self._running.clear()  # what an interrupt has left: no model calls itself
        if not self._running:
            self._entered(module, path)
        self._running.append((module, path))
        return self._widened(args) if isinstance(module, _WANT_FP32) else None

    def _after(self, module: nn.Module, _: Any, result: Any) -> Any:
        if threading.get_ident() != self._thread or not self._running:
            return None
        while self._running.pop()[0] is not module:
            pass  # those that raised
        return self._left(module, result) if not self._running else None


_WANT_FP32 = (torch.jit.ScriptModule, nn.RNNBase)
"""They take no input but in the dtype of their weights: no mode sees what a scripted part calls,
and nn.LSTM asks before it calls what the plan is about."""


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}
