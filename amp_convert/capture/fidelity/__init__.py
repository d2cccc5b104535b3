"""Is a captured FP32 graph the eager model, bit for bit?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.capture.fidelity.compare import Fidelity as Fidelity
    from amp_convert.capture.fidelity.compare import FidelityStatus as FidelityStatus
    from amp_convert.capture.fidelity.compare import check as check
    from amp_convert.capture.fidelity.compare import unchecked as unchecked

__getattr__, __all__ = names_in(__name__, compare="Fidelity FidelityStatus check unchecked")
