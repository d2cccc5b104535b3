"""The cheapest plan within a tolerance: a converted model's error budget and prices -> `Tuned`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.tune.results import Tuned as Tuned

__getattr__, __all__ = names_in(__name__, results="Tuned")
