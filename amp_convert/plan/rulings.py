"""What the rules say of each node of a graph, before anything is painted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from amp_convert.capture.captured import Value
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import name_of
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.plan.guards import GuardFinding
from amp_convert.plan.plan import DecisionKind, OperatorRule
from amp_convert.rules.rule import Category, Painting, Target
from amp_convert.rules.rule_file import is_known_op
from amp_convert.rules.rule_set import Place, Rules


@dataclass(frozen=True)
class Ruling:
    """Why a node is what it is: the rule that gave its category, or what overruled it."""

    kind: DecisionKind
    category: Category | None
    rule: str
    reason: str
    source: str
    pinned: bool = False
    evidence: str = ""
    guard: str = ""
    measured: float | None = None
    limit: float | None = None
    # What the op is by its own rule: a pinned node still passes a denial on.
    own: Category | None = None

    @property
    def explicit(self) -> bool:
        """Whether the model's own code decided."""
        return self.kind is DecisionKind.EXPLICIT


NOTHING = Ruling(DecisionKind.NONE, None, "", "", "")


_UNKNOWN = Ruling(
    DecisionKind.UNKNOWN, None, "unknown op", "no rule names this op, so it stays in FP32", ""
)


_EXPLICIT = Ruling(
    DecisionKind.EXPLICIT, Category.DENY, "explicit cast",
    "the model's own code asks for this dtype", "model",
)  # fmt: skip


# A cast to another tensor's dtype. Under autocast that may be the dtype of a weight, FP32.
_WORKING = Ruling(
    DecisionKind.RULE, Category.ALLOW, "working dtype",
    "the model's own code goes back to the dtype that it works in", "model", own=Category.ALLOW,
)  # fmt: skip


_WORKING_IN_FP32 = Ruling(
    DecisionKind.RULE, Category.DENY, "working dtype",
    "the model's own code asks for a dtype that is FP32 under autocast", "model",
)  # fmt: skip


# An op rule cannot see arguments.
_ACCUMULATING = Ruling(
    DecisionKind.RULE, Category.DENY, "accumulating write",
    "it adds up values that fall on one place", "planner",
)  # fmt: skip


_AUTOCAST_OFF = Ruling(
    DecisionKind.RULE, Category.DENY, "autocast off",
    "the model's own code switches autocast off around it", "model", pinned=True,
)  # fmt: skip


def ruling_of(finding: GuardFinding) -> Ruling:
    """What a guard that fired says."""
    return Ruling(
        DecisionKind.GUARD, Category.DENY, f"guard {finding.guard}", finding.reason, "",
        evidence=finding.evidence, guard=finding.guard, measured=finding.measured,
        limit=finding.limit,
    )  # fmt: skip


def _arguments(node: fx.Node) -> set[str]:
    """The names of the schema arguments that a call gives."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {*names[: len(node.args)], *node.kwargs}


class Judge:
    """What rules say of the nodes of one graph. `refused` maps operators (with overload) to what
    their kernels said."""

    def __init__(
        self, rules: Rules, dtype: torch.dtype, device: str, mode: Mode, refused: Mapping[str, str]
    ) -> None:
        self._rules, self._refused = rules, refused
        self._place = Place(name_of(dtype), device, mode)

    def of(self, node: fx.Node, info: NodeInfo, result: Any) -> Ruling:
        """The ruling on a node that there is something to decide about; `result` is its recorded
        value."""
        place = self._place
        rule = self._rules.match_override(
            place, node=info.identity, layer=info.layer, modules=info.modules
        )
        is_cast = facts_of_target(node.target).is_a(Family.CAST)
        explicit = is_cast and isinstance(result, Value) and "dtype" in _arguments(node)
        if explicit and not info.goes_low:
            return _EXPLICIT
        by_op = self._rules.match_op(place, info.op)
        own = by_op.category if by_op is not None else None
        if rule is None and info.autocast_off:
            return replace(_AUTOCAST_OFF, own=own)
        if rule is None and info.goes_low and own is not Category.DENY:
            native = self._rules.painting is Painting.AUTOCAST
            return _WORKING if not native or "autocast" in info.goes_low else _WORKING_IN_FP32
        if rule is None:
            rule = by_op
            if rule is not None and rule.category is Category.INFER and self._accumulates(node):
                return _ACCUMULATING
        if rule is None:
            return _UNKNOWN
        if info.op in self._refused and rule.category is not Category.DENY:
            return Ruling(
                DecisionKind.REFUSED, Category.DENY, "no kernel",
                f"no {place.dtype} kernel for it on {place.device}", "measured",
                pinned=True, evidence=self._refused[info.op], own=own,
            )  # fmt: skip
        override = rule.target is not Target.OP
        return Ruling(
            DecisionKind.OVERRIDE if override else DecisionKind.RULE,
            rule.category, rule.name, rule.reason, rule.source,
            pinned=override and rule.category in (Category.ALLOW, Category.DENY), own=own,
        )  # fmt: skip

    def _accumulates(self, node: fx.Node) -> bool:
        """Whether the node is an `index_put` that adds to what is there: in FP16, 4096 values that
        fall on one place leave an error of 1e-2. Autocast's own painting does as autocast does."""
        if self._rules.painting is Painting.AUTOCAST:
            return False
        writes = facts_of_target(node.target).is_a(Family.ACCUMULATING_WRITE)
        return writes and True in (*node.args[3:4], *node.kwargs.values())


def operator_rules(rules: Rules, dtype: str, device: str) -> tuple[OperatorRule, ...]:
    """What the rules say of each operator: one entry where both modes agree."""
    by_mode = {mode: rules.op_categories(Place(dtype, device, mode)) for mode in Mode}
    found: dict[OperatorRule, None] = {}
    for mode, categories in by_mode.items():
        for pattern, category in categories.items():
            if not is_known_op(pattern):
                continue  # a preset names it for another version of PyTorch
            agreed = all(other.get(pattern) is category for other in by_mode.values())
            found[OperatorRule(pattern, category, "" if agreed else mode)] = None
    return tuple(found)
