"""Models saved as archives, for tests that read them back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.rewrite.frozen_model import FrozenModel
from amp_convert.saved_model.archive import Archive


def saved(model: nn.Module, path: Path, *args: Any, **kwargs: Any) -> tuple[FrozenModel, Archive]:
    """`model` converted, frozen and saved as `path`."""
    frozen = amp.convert(model.eval(), args, kwargs, train=False).freeze()
    archive = amp.save(frozen, path)
    assert archive is not None
    return frozen, archive


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Named:
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]


pytree.register_dataclass(Named)
