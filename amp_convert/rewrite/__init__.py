"""`Captured` and `Plan` -> `ConvertedModel`: the graphs with casts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.rewrite.conversion import convert_captured as convert_captured
    from amp_convert.rewrite.converted_model import ConvertedModel as ConvertedModel
    from amp_convert.rewrite.frozen_model import FrozenModel as FrozenModel

__getattr__, __all__ = names_in(
    __name__,
    conversion="convert_captured",
    converted_model="ConvertedModel",
    frozen_model="FrozenModel",
)
