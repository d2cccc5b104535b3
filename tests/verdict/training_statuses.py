"""What tests of this folder share."""

from __future__ import annotations

from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_checks import (
    training_checks,
)
from tests.evidence import FP16


def statuses(found: TrainingParity | None, limits: Thresholds = FP16) -> dict[str, str]:
    return {check.name: check.status for check in training_checks(found, "no batches", limits)}
