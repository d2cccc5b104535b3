"""What the run did not check or cover, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from amp_convert.capture.captured import Uncaptured
from amp_convert.core.batches import LOSS
from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport, Unchecked
from amp_convert.report.sections.grouping import layer_name
from amp_convert.validate.training.arm_specs import FP32, PAIR
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.check import CheckStatus


@dataclass(frozen=True)
class Gap:
    """Something that the run did not check or cover, and why; `checks` names those that it leaves
    unchecked."""

    what: str
    reason: str
    checks: tuple[str, ...] = ()


def gaps(report: RunReport) -> list[Gap]:
    """Everything that was not checked or is not covered; what shares a reason is one entry."""
    plan, checks = report.plan, report.verdict.checks
    covered = coverage_gaps(plan.unknown_ops, plan.uncaptured, plan.unmatched_rules)
    # What is listed part by part needs no line of its own.
    told = {name for gap in covered for name in gap.checks}
    found = [
        Gap(check.name, check.reason, (check.name,))
        for check in checks
        if check.status == CheckStatus.UNCHECKED and check.name not in told
    ]
    if isinstance(report.training, Unchecked) and all(c.name != "training" for c in checks):
        found.append(Gap("training", report.training.reason))
    if isinstance(report.training, TrainingParity):
        found += _training_gaps(report.training)
    if isinstance(report.onnx, Unchecked) and all(c.name != "onnx" for c in checks):
        found.append(Gap("onnx", report.onnx.reason))
    if isinstance(report.attribution, Unchecked):
        found.append(Gap("where the error comes from", report.attribution.reason))
    for cost in report.inference.costs if report.inference else ():
        if cost.note and (cost.milliseconds is None or cost.peak_bytes is None):
            found.append(Gap(f"cost of the {cost.arm} arm", cost.note))
    for fixed in report.fixed_sizes:
        what = f"other sizes in {fixed.mode} mode, {layer_name(fixed.layer)}"
        why = f"the graph takes those of the example inputs alone: {fixed.reason}"
        found.append(Gap(what, why))
    return _merged([*found, *covered])


def _training_gaps(parity: TrainingParity) -> list[Gap]:
    """What was not looked at in training; checks that could not run are not repeated here."""
    found = [
        Gap(f"training of the {arm.arm} arm", arm.note)
        for arm in parity.run.arms
        if arm.note and arm.arm not in [spec.name for spec in PAIR]
    ]
    fp32 = parity.run.arm(FP32.name)
    if fp32 is not None and set(fp32.metrics) == {LOSS}:
        reason = "the model file gives no metrics, so training is judged by its loss alone"
        found.append(Gap("metrics after training", reason))
    if parity.noninferiority is None and not parity.pairs:
        reason = "one pair was trained; --seeds tests whether mixed is worse over several"
        found.append(Gap("training over seeds", reason))
    return found


def _merged(gaps: Iterable[Gap]) -> list[Gap]:
    """One entry a reason."""
    groups: dict[str, list[Gap]] = {}
    for gap in gaps:
        groups.setdefault(fmt.printable(gap.reason), []).append(gap)
    return [
        Gap(
            ", ".join(dict.fromkeys(fmt.printable(gap.what) for gap in group)),
            reason,
            tuple(dict.fromkeys(check for gap in group for check in gap.checks)),
        )
        for reason, group in groups.items()
    ]


def coverage_gaps(
    unknown_ops: dict[str, int], uncaptured: Iterable[Uncaptured], unmatched_rules: Iterable[str]
) -> list[Gap]:
    """Ops in no rule and parts of the model that could not be captured, which both stay FP32; and
    the user's rules that name nothing in this model."""
    found = [
        Gap(f"{op}, {fmt.count(number, 'node')}", f"{op} is in no rule, so it stays float32")
        for op, number in sorted(unknown_ops.items(), key=lambda item: -item[1])
    ]
    for part in uncaptured:
        place = f" ({part.location})" if part.location else ""
        mend = f". {part.mend}" if part.mend else ""
        why = f"not captured, stays eager float32: {part.reason}{place}{mend}"
        found.append(Gap(layer_name(part.layer), why, ("capture.whole",)))
    found += [
        Gap(f"rule {rule}", "it matches nothing in this model, so it decided nothing")
        for rule in unmatched_rules
    ]
    return _merged(found)
