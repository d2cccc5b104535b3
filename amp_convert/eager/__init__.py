"""A plan applied to a running model, operation by operation, without a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.eager.eager_plan import EagerPlan as EagerPlan
    from amp_convert.eager.plan_mode import Counts as Counts
    from amp_convert.eager.plan_mode import no_plan as no_plan

__getattr__, __all__ = names_in(__name__, eager_plan="EagerPlan", plan_mode="Counts no_plan")
