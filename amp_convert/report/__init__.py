"""The report stage: one writer a format, each taking only a `RunReport`."""

from __future__ import annotations

from amp_convert.report.model import (
    SCHEMA_VERSION,
    Environment,
    ModelInfo,
    OnnxSection,
    PlanSection,
    RunReport,
    Unchecked,
)

__all__ = [
    "SCHEMA_VERSION",
    "Environment",
    "ModelInfo",
    "OnnxSection",
    "PlanSection",
    "RunReport",
    "Unchecked",
]
