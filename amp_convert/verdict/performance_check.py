"""Is the converted model faster? Measured where the device has fast kernels for the dtype.

The frozen model's forward pass is held against FP32's. Without `--min-speedup` nothing was asked,
so a model that is slower leaves the verdict as it is, and is said in its first line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.validate.inference.results import Divergence

NAME = "performance.inference"


def performance_check(divergence: Divergence | None, limits: Thresholds) -> Check:
    asked = limits.min_speedup > 0
    least = limits.min_speedup if asked else 1.0
    check = _measured(divergence, least, asked=asked)
    return replace(check, required=asked)


def _measured(divergence: Divergence | None, least: float, *, asked: bool) -> Check:
    costs = {cost.arm: cost for cost in divergence.costs} if divergence is not None else {}
    times = [costs[arm].milliseconds if arm in costs else None for arm in ("fp32", "frozen")]
    fp32, frozen = times
    if divergence is None or fp32 is None or frozen is None:
        notes = [cost.note for cost in costs.values() if cost.milliseconds is None]
        reason = notes[0] if notes else "no forward pass was timed"
        return Check(NAME, CheckStatus.UNCHECKED, None, least, reason)
    # A time of 0 is under the clock's resolution.
    speedup = fp32 / frozen if frozen > 0 else None
    said = f"a forward pass takes {frozen:.3g} ms frozen, {fp32:.3g} ms in FP32"
    if divergence.slow_kernels:
        reason = f"{divergence.slow_kernels}; {said}"
        return Check(NAME, CheckStatus.UNCHECKED, speedup, least, reason)
    if speedup is None:
        return Check(NAME, CheckStatus.UNCHECKED, None, least, f"{said}: too short to time")
    if speedup >= least:
        return Check(NAME, CheckStatus.PASS, speedup, least, f"{speedup:.2f} times as fast: {said}")
    status = CheckStatus.FAIL if asked else CheckStatus.UNCHECKED
    slower = "slower than FP32" if speedup < 1 else f"only {speedup:.2f} times as fast as FP32"
    return Check(NAME, status, speedup, least, f"the converted model is {slower}: {said}")


def is_slower(divergence: Divergence | None, checks: Iterable[Check]) -> Check | None:
    """The check, where it found a model slower than FP32 on a device with fast kernels."""
    found = next((check for check in checks if check.name == NAME), None)
    if found is None or divergence is None or divergence.slow_kernels:
        return None
    return found if isinstance(found.value, float) and found.value < 1 else None
