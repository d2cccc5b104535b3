"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Sequence

from amp_convert.validate.training.results import PairedRun
from amp_convert.verdict.check import Check
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_run_checks import (
    loss_check,
)
from tests.evidence import FP16
from tests.training_evidence import LOSSES, parity


def ending(last: float, first: Sequence[float] = LOSSES[:6]) -> tuple[float, ...]:
    """Losses whose mean over the last quarter is `last`."""
    return (*first, last, last)


def loss_of(paired: PairedRun, limits: Thresholds = FP16) -> Check:
    return loss_check(parity(paired), limits)
