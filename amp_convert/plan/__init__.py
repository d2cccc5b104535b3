"""`Captured`, `Rules` and `RangeStats` -> `Plan`: a precision and a reason for every node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.plan.plan import Decision as Decision
    from amp_convert.plan.plan import DecisionKind as DecisionKind
    from amp_convert.plan.plan import Plan as Plan
    from amp_convert.plan.planner import make_plan as make_plan

__getattr__, __all__ = names_in(__name__, plan="Decision DecisionKind Plan", planner="make_plan")
