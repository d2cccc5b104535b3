"""What a reader is told of the plan on the eager model."""

from __future__ import annotations

from collections.abc import Sequence

from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.report.sections.grouping import layer_name, pattern_of
from amp_convert.validate.inference.results import PlanGap

_MOST = 3


def eager_plan_text(report: RunReport) -> str:
    """What `plan.autocast` gives beside the converted model, in a sentence; "" where that was not
    looked at."""
    found = report.inference.eager_plan if report.inference else None
    if found is None:
        return ""
    if found.reason:
        return f"not compared: {fmt.printable(found.reason)}"
    same = "the converted model's bits"
    said = [same if found.identical else f"parts from it by {fmt.error(found.rel_l2)}"]
    if found.unplanned:
        said.append(f"by the rule for their operator alone: {_calls(found.unplanned)}")
    if found.held_back:
        said.append(f"in place, so in the dtype of what they write to: {_calls(found.held_back)}")
    return "; ".join(said)


def _calls(gaps: Sequence[PlanGap]) -> str:
    """ "aten.index_copy in transformer.h.*.attn (2 calls)", the most frequent first."""
    groups: dict[tuple[str, str], int] = {}
    for gap in gaps:
        key = (gap.op, pattern_of(gap.layer))
        groups[key] = groups.get(key, 0) + gap.calls
    ranked = sorted(groups.items(), key=lambda item: -item[1])
    shown = [
        f"{fmt.printable(op)} in {layer_name(layer)} ({fmt.count(calls, 'call')})"
        for (op, layer), calls in ranked[:_MOST]
    ]
    left = len(ranked) - _MOST
    return ", ".join([*shown, *([f"{left} more"] if left > 0 else [])])
