"""What tests of this folder share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from amp_convert.validate.training.recipe import Recipe
from tests.training import OPTIMIZERS, classify


def how(**options: Any) -> Recipe:
    return Recipe(classify, OPTIMIZERS["adamw"], **options)


def stop_after(steps: int) -> tuple[Callable[[], None], Callable[[], bool]]:
    made = itertools.count()
    return (lambda: None), (lambda: next(made) >= steps)
