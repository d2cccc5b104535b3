"""A module -> `Captured`: functional FP32 graphs that are held against the eager model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.capture.captured import Captured as Captured
    from amp_convert.capture.captured import Region as Region
    from amp_convert.capture.captured import Value as Value
    from amp_convert.capture.fidelity import Fidelity as Fidelity
    from amp_convert.capture.regions import capture as capture

__getattr__, __all__ = names_in(
    __name__, captured="Captured Region Value", fidelity="Fidelity", regions="capture"
)
