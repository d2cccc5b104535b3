"""The gate: is this run as good as the baseline? For merge checks.

The report is first brought into the form of a baseline, so both sides are rounded alike and a
report equals its own baseline; nodes that were renamed are found by what they compute (see
`renamed`). Then, by stable names, a finding each for:

1. a report whose own verdict is fail;
2. a check that ran in the baseline and is unchecked or gone now, or that passed and fails now;
   but one on training that ran now too and cannot tell is a note;
3. a tolerance or a margin that is looser now, and fewer batches, steps or seeds;
4. a metric that is gone, or worse than before by more than the tolerance;
5. casts added, and multiply-adds that are no longer in low precision;
6. a node, or a whole layer, that computed in low precision and is in FP32 now;
7. a node whose local or accumulated error grew by more than the factor, is NaN or infinite now, or
   is no longer measured. Errors below one rounding of the dtype count as one: that is noise.

Of training only the checks are compared, as in 2. On another machine both of its arms have other
bits, and a metric after it another value, which is no regression; and each report has held its own
mixed arm to its own FP32 arm.

Any finding fails the gate. Without one, an inconclusive report, a baseline without errors to
compare, or one of whose nodes less than `ENOUGH` are still there, leaves it inconclusive. What is
new, gone or ruled otherwise is a note, and no failure.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from amp_convert.core.errors import UsageError
from amp_convert.gate.baseline import Baseline, BaselineModel, BaselineNode, baseline_of
from amp_convert.gate.regressions import (
    Regression,
    RegressionKind,
    added_casts,
    less_work,
    looser,
    newly_fp32,
    replaced,
    undecided,
    worse_checks,
    worse_errors,
    worse_metrics,
)
from amp_convert.gate.renamed import under_old_names
from amp_convert.report import RunReport
from amp_convert.verdict.thresholds import require_finite
from amp_convert.verdict.verdict import EXIT_CODES, VerdictStatus

_UPDATE = "Compare runs of the same kind, or write this baseline anew with --update."
ENOUGH = 0.5
"""The share of the baseline's nodes that a comparison needs."""
ON_NODES = (RegressionKind.NEWLY_FP32, RegressionKind.ERROR, RegressionKind.UNMEASURED)


@dataclass(frozen=True)
class GateResult:
    """What the gate found. `compared` counts the nodes that both runs have."""

    status: VerdictStatus
    findings: tuple[Regression, ...]
    notes: tuple[str, ...]
    compared: int

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.status]

    def to_json(self) -> str:
        """The result as strict JSON; numbers that JSON lacks are strings, as in the report."""

        def plain(value: object) -> object:
            if isinstance(value, float) and not math.isfinite(value):
                return str(value).replace("nan", "NaN").replace("inf", "Infinity")
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return json.dumps(plain(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n"


def compare(
    report: RunReport, baseline: Baseline, *, factor: float = 2.0, metric_tolerance: float = 0.01
) -> GateResult:
    """Hold `report` against `baseline`.

    `factor` bounds the growth of an error (at least 1); `metric_tolerance` is relative, as in the
    verdict. Raises UsageError when the two are of different models, dtypes or devices, when they
    have no node in common, and for a factor or tolerance that is not a finite number.
    """
    require_finite("the factor", factor, at_least=1.0)
    require_finite("the metric tolerance", metric_tolerance, at_least=0.0)
    now = baseline_of(report)
    refuse_other(baseline, dtype=now.dtype, device=now.device, model=now.model)
    now, renamed = under_old_names(now, baseline)
    common = baseline.nodes.keys() & now.nodes.keys()
    if not common:
        what = "the report and the baseline have no node in common, so nothing was compared"
        raise UsageError(what, mend=_UPDATE)
    decisions = {renamed.get(d.node, d.node): d for d in report.plan.decisions}
    findings = (
        *worse_checks(report, now, baseline),
        *looser(now, baseline),
        *worse_metrics(now, baseline, metric_tolerance),
        *added_casts(now, baseline),
        *less_work(now, baseline),
        *newly_fp32(decisions, now, baseline),
        *replaced(report, decisions, now, baseline),
        *worse_errors(now, baseline, factor),
    )
    measured = any(_measured(baseline.nodes[node]) for node in common)
    enough = len(common) >= ENOUGH * len(baseline.nodes)
    status = VerdictStatus.FAIL if findings else VerdictStatus.PASS
    passed = report.verdict.status == VerdictStatus.PASS
    if not findings and not (passed and measured and enough):
        status = VerdictStatus.INCONCLUSIVE
    notes = (*_notes(report, now, baseline), *_renamed(renamed))
    return GateResult(status, findings, notes, len(common))


def refuse_other(
    baseline: Baseline, *, dtype: str, device: str, model: BaselineModel | None = None
) -> None:
    """Raises UsageError where a baseline is of another dtype, device type or model: to be called as
    soon as these are known, and not after the work."""
    pairs = [("dtype", dtype, baseline.dtype), ("device", device, baseline.device)]
    if model is not None:
        pairs += [
            ("model", model.name, baseline.model.name),
            ("model class", model.model_class, baseline.model.model_class),
        ]
    for what, mine, theirs in pairs:
        if mine != theirs:
            message = f"the report's {what} is {mine}, the baseline's is {theirs}"
            raise UsageError(message, mend=_UPDATE)


def _renamed(renamed: dict[str, str]) -> Iterator[str]:
    if renamed:
        new, old = next(iter(renamed.items()))
        yield f"{len(renamed)} node(s) go by other names, matched by structure: {old} is {new}"


def _measured(node: BaselineNode) -> bool:
    return node.local_rel_l2 is not None or node.accumulated_rel_l2 is not None


def _notes(report: RunReport, now: Baseline, before: Baseline) -> Iterator[str]:
    if report.verdict.status == VerdictStatus.INCONCLUSIVE:
        yield "the report's own verdict is inconclusive"
    if not any(_measured(node) for node in before.nodes.values()):
        yield "the baseline holds no node errors, so none were compared"
    if now.rules != before.rules:
        yield f"rules were {', '.join(before.rules)}, are {', '.join(now.rules)}"
    for name, reason in undecided(report).items():
        if before.checks.get(name) == "pass":
            yield f"{name} passed in the baseline and has no answer now: {reason}"
    common = before.nodes.keys() & now.nodes.keys()
    if len(common) < ENOUGH * len(before.nodes):
        yield (
            f"only {len(common)} of the baseline's {len(before.nodes)} nodes are still there, too "
            "few to say that this is as good"
        )
    for what, names in (
        ("gone", sorted(before.nodes.keys() - now.nodes.keys())),
        ("new", sorted(now.nodes.keys() - before.nodes.keys())),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"{len(names)} node(s) {what}: {', '.join(names[:3])}{rest}"


def by_layer(findings: Iterable[Regression]) -> list[tuple[Regression, int]]:
    """Findings on nodes, one a layer and kind: the worst, and how many there are; others singly."""
    groups: dict[tuple[str, ...], list[Regression]] = {}
    for finding in findings:
        key = (finding.kind, finding.layer) if finding.kind in ON_NODES else (finding.subject,)
        groups.setdefault((finding.kind, *key), []).append(finding)
    return [(max(group, key=_severity), len(group)) for group in groups.values()]


def _severity(finding: Regression) -> float:
    """The error now, NaN being the largest; the same for all findings that hold no error."""
    if not isinstance(finding.after, float):
        return 0.0
    return math.inf if math.isnan(finding.after) else finding.after
