"""The checks of arms that have other bits than the one that was compared: with gradients on, with
BatchNorm folded, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.inference_checks import nothing_ran
from amp_convert.verdict.metric_checks import metric_check
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.plan.plan import Plan
    from amp_convert.validate.inference.results import Divergence, MetricPair, OutputError
from amp_convert.verdict.output_checks import autocast_check, checks_of_outputs


def untuned_check(
    plan: Plan, divergence: Divergence | None, limits: Thresholds, *, metrics_hold: bool = False
) -> Check:
    """The outputs of the graph that runs with gradients on, under compilers and in `torch.func`: it
    has the same precisions and other kernels than the one that runs without (see
    `rewrite.kernels`), and is held to the same limits."""
    name = "outputs.untuned"
    rows, missing = divergence.untuned_outputs if divergence else (), nothing_ran(plan, divergence)
    if not rows:
        reason = missing or (
            "a model in parts was run without gradients alone; with them, its parts use other "
            "kernels, whose nodes were compared"
        )
        return Check(name, CheckStatus.UNCHECKED, None, None, reason, required=False)
    checks = checks_of_outputs("outputs", rows, missing, limits, metrics_hold=metrics_hold)
    return as_one(name, "with gradients on", checks)


def folded_checks(plan: Plan, divergence: Divergence | None, limits: Thresholds) -> list[Check]:
    """The outputs and metrics of the frozen model with BatchNorm folded, which has other bits than
    the one that was compared; none where it was not asked for."""
    if divergence is None or not divergence.folded_outputs:
        return []
    name = "outputs.folded"
    folds = plan.batch_norm_folds
    left = [fold for fold in folds if fold.reason]
    said = f"{len(folds) - len(left)} of {len(folds)} BatchNorms folded"
    if left:
        said += f" (not {left[0].norm}: {left[0].reason})"
    if len(left) == len(folds):
        reason = said if folds else "no product has a BatchNorm behind it that could be folded"
        return [Check(name, CheckStatus.UNCHECKED, None, None, reason, required=False)]
    found = checks_of_arm("folded", divergence.folded_outputs, divergence.folded_metrics, limits)
    of_folded = replace(divergence, outputs=divergence.folded_outputs)
    return [as_one(name, f"with {said}", [*found, autocast_check(plan, of_folded, limits)])]


def checks_of_arm(
    arm: str, outputs: Sequence[OutputError], metrics: Sequence[MetricPair], limits: Thresholds
) -> list[Check]:
    """The checks of an arm that has other bits than the one that was compared: its outputs, and its
    own metrics, which alone can say that a faint channel does not matter."""
    judged = [
        metric_check(f"metrics.{pair.name}", pair, limits.metric_tolerance, arm) for pair in metrics
    ]
    hold = bool(judged) and all(check.status is CheckStatus.PASS for check in judged)
    return [*checks_of_outputs("outputs", outputs, "", limits, metrics_hold=hold), *judged]


def as_one(name: str, how: str, checks: Sequence[Check]) -> Check:
    """One check for all of an arm's: the first that fails, or else the first that is required and
    unchecked, decides."""
    for status in (CheckStatus.FAIL, CheckStatus.UNCHECKED):
        for check in checks:
            if check.status is status and (status is CheckStatus.FAIL or check.required):
                reason = f"{how}, {check.name} does not hold: {check.reason}"
                if status is CheckStatus.UNCHECKED:
                    reason = f"{how}, {check.name} is unchecked: {check.reason}"
                return Check(name, status, check.value, check.threshold, reason)
    return Check(name, CheckStatus.PASS, None, None, f"the outputs {how} hold as well")
