"""The tensors that a module holds, and how to let it hold others: what each arm has of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from amp_convert.core.errors import ModelError
from amp_convert.core.number_formats import name_of


class Weights:
    """The parameters and buffers of a module: a place for each, and what to put there.

    `model` is the module. Shared tensors count once. `names` has their dotted names, in the
    module's order. Raises ModelError for two parameters on the same memory, which would come apart.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parameters = dict(model.named_parameters())
        places: dict[int, str] = {}
        for name, parameter in self._parameters.items():
            first = places.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
            if first != name:
                what = f"the parameters {first} and {name} share their memory"
                raise ModelError(what, mend="Let both names hold one torch.nn.Parameter.")
        self._slots = {}
        for name, _ in model.named_buffers():
            path, _, key = name.rpartition(".")
            self._slots[name] = (model.get_submodule(path)._buffers, key)
        self.names = (*self._parameters, *self._slots)
        # A buffer under several names is one tensor, and has to stay one.
        self._aliases: dict[str, list[tuple[dict[str, torch.Tensor | None], str]]] = {}
        owners: dict[int, str] = {id(b): name for name, b in model.named_buffers()}
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    self._aliases.setdefault(owners[id(buffer)], []).append((module._buffers, key))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's parameters by name."""
        return self._parameters

    def get(self) -> dict[str, torch.Tensor]:
        """The tensors that are in the module now: not copies."""
        buffers = {name: table[key] for name, (table, key) in self._slots.items()}
        found = {name: parameter.data for name, parameter in self._parameters.items()}
        return {**found, **{n: b for n, b in buffers.items() if b is not None}}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the module hold these tensors, which it may write to."""
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]
        for name, places in self._aliases.items():
            for table, key in places:
                table[key] = tensors[name]

    def check(self, before: Mapping[str, torch.Tensor], what: str, where: str) -> None:
        """Raises ModelError where a parameter is of another kind than in `before`."""
        for name, parameter in self._parameters.items():
            old, new = before[name], parameter.data
            if (old.dtype, old.shape, old.device) != (new.dtype, new.shape, new.device):
                raise ModelError(
                    f"{what} made {name} a {name_of(new.dtype)} tensor of shape "
                    f"{tuple(new.shape)} on {new.device}; it was {name_of(old.dtype)}, "
                    f"{tuple(old.shape)} on {old.device}",
                    where=where,
                    mend="Use one that keeps FP32 weights as they are.",
                )
