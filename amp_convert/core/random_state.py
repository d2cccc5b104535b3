"""The state of every global random number generator, as one value: taken, put back, seeded."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class RngState:
    """The state of every global random number generator: PyTorch's of the CPU and, on CUDA, of the
    device, Python's and NumPy's. All but the tensors is plain data."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    def same(self, other: RngState) -> bool:
        """Whether both go on with the same numbers."""
        mine, theirs = self.device, other.device
        alike = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        rest = (self.python, self.numpy) == (other.python, other.numpy)
        return alike and rest and torch.equal(self.cpu, other.cpu)

    def drawn_outside_torch(self, later: RngState) -> list[str]:
        """Whose generators have drawn numbers between this state and a later one, PyTorch's left
        out: "Python" and "NumPy"."""
        pairs = {"Python": (self.python, later.python), "NumPy": (self.numpy, later.numpy)}
        return [name for name, (before, after) in pairs.items() if before != after]


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(device, state)


def rng_state(device: torch.device) -> RngState:
    """The random state of the CPU and, on CUDA, of `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, tuple(np.asarray(keys).tolist()), *rest)
    return RngState(torch.get_rng_state(), cuda, random.getstate(), numpy)


def set_rng_state(device: torch.device, state: RngState) -> None:
    """Go back to a state that `rng_state` returned. Raises whatever comes of anything else."""
    if not 0 <= state.numpy[2] <= len(state.numpy[1]) == 624:
        raise ValueError("no state of NumPy's generator")  # which would read beyond its end
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.cuda.set_rng_state(state.device, device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


def seed_all(seed: int) -> None:
    """Start every global random number generator from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
