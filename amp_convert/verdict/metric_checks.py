"""The checks of a verdict on the user's metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from amp_convert.validate.inference.results import MetricDoubt
from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.thresholds import RESOLVED, Thresholds, metric_limit

if TYPE_CHECKING:
    from amp_convert.validate.inference.results import Divergence, MetricPair


def metric_checks(
    divergence: Divergence | None, limits: Thresholds, *, supplied: bool
) -> list[Check]:
    """The user's metrics; required where some were `supplied`."""
    if divergence is None or not divergence.metrics or divergence.batches <= 0:
        given = divergence.metrics_reason if divergence else ""
        why = given or "no metric was computed"
        return [Check("metrics", CheckStatus.UNCHECKED, None, None, why, required=supplied)]
    return [
        metric_check(f"metrics.{pair.name}", pair, limits.metric_tolerance, required=supplied)
        for pair in divergence.metrics
    ]


def metric_check(
    name: str, pair: MetricPair, tolerance: float, arm: str = "mixed", *, required: bool = True
) -> Check:
    """Whether the `mixed` value of a metric is FP32's; `arm` says whose it is.

    Worse than the tolerance fails, unless as few samples as there are do not resolve it: then it is
    unchecked, as is one that is too good to come from precision, and one that judges nothing.
    """
    lower = pair.lower_is_better
    limit = metric_limit(pair.fp32, tolerance, lower_is_better=lower, spread=pair.spread)
    reason = f"{pair.mixed:.6g} {arm} against {pair.fp32:.6g} in FP32"
    status, more = _metric_status(pair, limit, arm)
    return Check(name, status, pair.mixed, limit, reason + more, required)


def _metric_status(pair: MetricPair, limit: float, arm: str) -> tuple[CheckStatus, str]:
    """The status, and what to add to the reason."""
    if pair.unpaired:
        return CheckStatus.FAIL, f": on {pair.unpaired} batch(es) only one of the two has it"
    if not math.isfinite(pair.fp32):
        return CheckStatus.UNCHECKED, ": a metric that is not finite in FP32 judges nothing"
    if not math.isfinite(pair.mixed):
        return CheckStatus.FAIL, f": it is not finite {arm}"
    if pair.doubt == MetricDoubt.STATEFUL:
        what = "metrics() gives another value when it is called again with the same outputs"
        return CheckStatus.UNCHECKED, f": {what}. Let it keep no state from call to call"
    allowance = abs(limit - pair.fp32)
    worse = pair.mixed - pair.fp32 if pair.lower_is_better else pair.fp32 - pair.mixed
    luck = RESOLVED * (pair.standard_error or 0.0)
    if worse > allowance + luck or not math.isfinite(luck):
        return CheckStatus.FAIL, ""
    if worse > allowance:
        what = f"the difference has a standard error of {pair.standard_error:.2g}"
        return CheckStatus.UNCHECKED, f": {what}, so more eval batches are needed to tell"
    if -worse > allowance + luck:
        return CheckStatus.UNCHECKED, ": better by more than precision can make it"
    if pair.doubt == MetricDoubt.CONSTANT:
        what = "metrics() gives the same for outputs that are certainly wrong"
        return CheckStatus.UNCHECKED, f": {what}, so this judges nothing"
    return CheckStatus.PASS, ""
