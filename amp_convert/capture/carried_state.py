"""Does a module go on from what its last call left in its attributes? A graph cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.fidelity.traces import identical, rel_l2
from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.random_state import preserved_rng
from amp_convert.core.tree_paths import leaves_by_path


def carried_state(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the attributes in which `module` keeps what its next call, in eval mode, goes on
    from. A graph has the values of one call in it for ever.

    Attributes that it writes and never reads, such as a count of calls, are none of these: what a
    call gives is compared with what it gives after a call with other inputs.
    """
    device = devices.of_model(module)
    inputs = (tuple(args), dict(kwargs))

    def called(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        given = pytree.tree_map_only(torch.Tensor, change, inputs)
        torch.manual_seed(0)
        with devices.exact_fp32(device), devices.plain_mode(device):
            result = module(*given[0], **given[1])
        leaves = leaves_by_path(result)
        return {path: leaf.clone() for path, leaf in leaves if isinstance(leaf, torch.Tensor)}

    with in_mode(module, training=False) as attributes, torch.no_grad(), preserved_rng(device):
        fresh = called(torch.clone)
        changed = attributes.changed()
        if not changed:
            return []
        attributes.restore()
        try:
            called(_other)
        except Exception:  # noqa: BLE001  a model may refuse other inputs, but not its own
            attributes.restore()
            called(torch.clone)
        after = called(torch.clone)
    if fresh.keys() == after.keys() and all(_alike(fresh[n], after[n]) for n in fresh):
        return []
    return list(changed)


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Other inputs of the same kind: in another order along all axes, and half as large."""
    if tensor.layout is not torch.strided:
        return tensor.clone()
    flipped = tensor.flip(*range(tensor.dim()))
    return flipped * 0.5 if tensor.is_floating_point() else flipped


_REPEATABLE = 1e-6
"""A relative L2 difference that two calls of one model may have: some kernels of a GPU add up in
another order each time."""


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return identical(a, b) or (a.shape == b.shape and rel_l2(a, b) <= _REPEATABLE)
