"""The report stage: one writer a format, each taking only a `RunReport`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.report.model import SCHEMA_VERSION as SCHEMA_VERSION
    from amp_convert.report.model import Environment as Environment
    from amp_convert.report.model import ModelInfo as ModelInfo
    from amp_convert.report.model import OnnxSection as OnnxSection
    from amp_convert.report.model import PlanSection as PlanSection
    from amp_convert.report.model import RunReport as RunReport
    from amp_convert.report.model import Unchecked as Unchecked

__getattr__, __all__ = names_in(
    __name__,
    model="SCHEMA_VERSION Environment ModelInfo OnnxSection PlanSection RunReport Unchecked",
)
