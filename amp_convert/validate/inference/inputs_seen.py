"""Do the inputs say anything? Placeholders (`torch.zeros`, with a mask of ones) do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


class InputsSeen:
    """Which number each input tensor is full of, as long as each is full of one.

    A tensor with several numbers says something, and so does one that changes from batch to batch.
    A single number is no placeholder.
    """

    def __init__(self) -> None:
        self._filled: dict[int, torch.Tensor] = {}
        self._varied = False

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take in the inputs of one batch."""
        for place, leaf in enumerate(pytree.tree_leaves((tuple(args), dict(kwargs)))):
            if self._varied or not isinstance(leaf, torch.Tensor) or leaf.numel() < 2:
                continue
            if leaf.layout is not torch.strided:
                self._varied = True
                return
            first = leaf.reshape(-1)[0].clone()
            before = self._filled.setdefault(place, first)
            self._varied = not bool((leaf == first).all()) or not torch.equal(first, before)

    @property
    def same(self) -> bool:
        """Whether every input was one and the same number throughout."""
        return bool(self._filled) and not self._varied
