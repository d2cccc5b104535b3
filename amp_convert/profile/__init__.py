"""`Captured` and calibration batches -> `RangeStats`: what values every node takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.profile.calibrate import RangeStats as RangeStats
    from amp_convert.profile.calibrate import profile as profile

__getattr__, __all__ = names_in(__name__, calibrate="RangeStats profile")
