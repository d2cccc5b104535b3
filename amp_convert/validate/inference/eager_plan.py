"""The plan applied to the eager model, held against the converted one on one batch.

Methods of the original, such as `generate`, run so, and so does whatever `plan.autocast` is put
around. Where both do the same, they give the same bits.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from amp_convert.validate.inference.other_arms import Planned, as_dtypes_of
from amp_convert.validate.inference.output_errors import OutputSums, accumulate, same_bits
from amp_convert.validate.inference.results import EagerPlanParity, PlanGap


def eager_plan_parity(planned: Planned, mixed: Any) -> EagerPlanParity:
    """What the original gave under the plan, beside what the converted model gave for the same
    batch from the same random state."""
    if planned.reason:
        return EagerPlanParity(reason=planned.reason)
    outputs = as_dtypes_of(planned.outputs, mixed)
    sums: dict[str, OutputSums] = {}
    accumulate(sums, mixed, outputs)
    return EagerPlanParity(
        identical=same_bits(mixed, outputs),
        rel_l2=max((total.row(name).rel_l2 for name, total in sums.items()), default=0.0),
        calls=planned.counts.calls,
        unplanned=_gaps(planned.counts.unplanned),
        held_back=_gaps(planned.counts.held_back),
    )


def _gaps(counts: Counter[tuple[str, str]]) -> tuple[PlanGap, ...]:
    return tuple(PlanGap(layer, op, calls) for (layer, op), calls in counts.most_common())
