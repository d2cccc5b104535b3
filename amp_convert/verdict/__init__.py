"""Evidence and `Thresholds` -> `Verdict`: the only place that says pass, fail or unchecked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.verdict.check import Check as Check
    from amp_convert.verdict.thresholds import Thresholds as Thresholds
    from amp_convert.verdict.verdict import Verdict as Verdict
    from amp_convert.verdict.verdict import judge as judge

__getattr__, __all__ = names_in(
    __name__, check="Check", thresholds="Thresholds", verdict="Verdict judge"
)
