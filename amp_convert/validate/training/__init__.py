"""Training: `ConvertedModel` and a recipe -> `TrainingParity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.validate.training.results import TrainingParity as TrainingParity

__getattr__, __all__ = names_in(__name__, results="TrainingParity")
