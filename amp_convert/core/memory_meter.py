"""Peak memory, counted from the storages that PyTorch's operators return while they are alive.

That is the same count on every device and for eager and captured code alike; it leaves out the
scratch space inside a kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of these tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(list(tensors))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """The largest number of bytes that tensors made during one call held at one time."""
    with StorageMeter() as meter:
        function()
    peak: int = meter.peak
    return peak


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate, from their birth to their death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        borrowed = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in borrowed:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors that have storage of their own: of a sparse one, its parts."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.sparse_coo:
            found += [leaf._indices(), leaf._values()]
        elif isinstance(leaf, torch.Tensor) and leaf.layout in (torch.sparse_csr, torch.sparse_bsr):
            found += [leaf.crow_indices(), leaf.col_indices(), leaf.values()]
        elif isinstance(leaf, torch.Tensor) and leaf.layout in (torch.sparse_csc, torch.sparse_bsc):
            found += [leaf.ccol_indices(), leaf.row_indices(), leaf.values()]
        elif isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            found.append(leaf)
    return found
