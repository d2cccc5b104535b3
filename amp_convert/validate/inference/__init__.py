"""Inference: `ConvertedModel` and batches -> `Divergence`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.validate.inference.results import Divergence as Divergence

__getattr__, __all__ = names_in(__name__, results="Divergence")
