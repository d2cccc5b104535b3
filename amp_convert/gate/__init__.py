"""Two reports -> `GateResult`: is this run as good as the baseline?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.gate.baseline import Baseline as Baseline
    from amp_convert.gate.compare import GateResult as GateResult
    from amp_convert.gate.regressions import Regression as Regression
    from amp_convert.gate.regressions import RegressionKind as RegressionKind

__getattr__, __all__ = names_in(
    __name__, baseline="Baseline", compare="GateResult", regressions="Regression RegressionKind"
)
