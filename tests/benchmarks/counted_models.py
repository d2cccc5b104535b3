"""The models whose kernel calls are counted: those of the tests, and those that are timed.

The latter, under "speed/", are as wide and deep as where they are timed on a CPU, with few and
short inputs: what is called does not depend on these. They are planned as a user's model is, by
rounding trials and all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.rewrite.converted_model import ConvertedModel
from tests import zoo
from tests.benchmarks import speed_models

_SPEED = "speed/"
_ANY_SIZE = ("resnet50", "mobilenetv2", "convnext", "unet")
"""Models that take images of any size."""
SPEED = [f"{_SPEED}{name}" for name in speed_models.MODELS if "batch" not in name]
MODELS = [*zoo.BUILDERS, *SPEED]


def example(name: str) -> zoo.Example:
    """The one model of that name that this process shares."""
    return _speed(name) if name in SPEED else zoo.example(name)


@functools.cache
def _speed(name: str) -> zoo.Example:
    plain = name.removeprefix(_SPEED)
    model, args, kwargs = speed_models.build(plain, full=False)

    def few(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor[:2, :32]
        return tensor[:2, :, :64, :64] if plain in _ANY_SIZE else tensor[:2]

    cut: tuple[Any, Any] = pytree.tree_map_only(torch.Tensor, few, (args, kwargs))
    return model, *cut


@functools.cache
def converted(name: str, dtype: torch.dtype) -> ConvertedModel:
    """The shared model, converted."""
    if name not in SPEED:
        return zoo.converted(name, dtype=dtype)
    model, args, kwargs = example(name)
    return amp.convert(model, args, kwargs, dtype=dtype)
