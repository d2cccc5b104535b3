"""What rounding does to a product that reads a weight too small for the low dtype's digits.

A weight of 1e-6 is subnormal in FP16 and keeps three of its digits. Whether that matters is seen in
the product alone: a bias of that size is nothing beside what it is added to, and everything to a
channel that is all bias. So the worst channel of the result speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from amp_convert.core.number_formats import is_float_tensor, unit_roundoff
from amp_convert.core.op_facts import HEAVY, Family, facts_of_target
from amp_convert.core.tensor_errors import CHUNK

_SOME = 0.01
"""Of the values of a weight."""
_CONVOLUTIONS = (Family.CONVOLUTION, Family.TRANSPOSED_CONVOLUTION)


class TinyWeights:
    """The products of one graph that read such weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tiny: dict[fx.Node, bool] = {}

    def concern(self, reader: fx.Node, env: Mapping[fx.Node, Any]) -> bool:
        """Whether a product reads a weight of which a hundredth is subnormal, or vanishes."""
        if not facts_of_target(reader.target).is_a(*HEAVY):
            return False
        smallest = torch.finfo(self._dtype).smallest_normal
        for source in reader.all_input_nodes:
            value = env.get(source)
            if source.op != "placeholder" or not is_float_tensor(value) or not value.numel():
                continue
            if source not in self._tiny:
                parts = value.detach().reshape(-1).split(CHUNK)
                small = sum(int(((p.abs() < smallest) & (p != 0)).sum()) for p in parts)
                self._tiny[source] = small / value.numel() >= _SOME
            if self._tiny[source]:
                return True
        return False

    def channel(self, reader: fx.Node, want: Any, have: Any) -> float:
        """The relative L2 error of the worst channel of a product, `have` beside `want`, in units
        of the roundoff. Channels are along dimension 1 of a convolution, the last one otherwise."""
        if not is_float_tensor(want) or want.shape != have.shape or not want.dim():
            return math.inf
        axis = 1 if facts_of_target(reader.target).is_a(*_CONVOLUTIONS) else -1
        rows = [t.double().movedim(axis, 0).flatten(1) for t in (want, have)]
        sizes = torch.linalg.vector_norm(rows[0], dim=1)
        errors = torch.linalg.vector_norm(rows[1] - rows[0], dim=1)
        relative = torch.where(errors == 0, 0.0, errors / sizes)
        return float(relative.max()) / unit_roundoff(self._dtype)
