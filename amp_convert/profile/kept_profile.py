"""Calibration, or what it found on the same model and batches in an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from amp_convert.capture.captured import Captured
from amp_convert.capture.kept import fingerprint
from amp_convert.capture.kept.answers import kept_plainly
from amp_convert.core.files.plain_data import PlainData
from amp_convert.profile.calibrate import Range, RangeStats, profile
from amp_convert.profile.growth import Growth


def kept_profile(
    captured: Captured,
    batches: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    dtypes: Sequence[torch.dtype],
    *,
    probes: bool,
) -> RangeStats:
    """`profile`, or what it found before on the same model and batches (see `kept.answers`)."""

    def about() -> str:
        inputs = (captured.args, dict(captured.kwargs), list(batches))
        return fingerprint.of_call(captured.model, inputs, list(map(str, dtypes)), probes)

    def found() -> RangeStats:
        return profile(captured, batches, dtypes, probes=probes)

    return kept_plainly("the ranges of the model", about, found, _PLAIN)


_PLAIN = PlainData(RangeStats, Range, Growth)
