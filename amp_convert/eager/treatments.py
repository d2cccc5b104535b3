"""Saved rules of a plan -> what is done to each call of a running model. Plain data.

A call is identified as a node of the plan is: by the layer that makes it, by its operator, and by
its place among that layer's calls of that operator. Names that compute the same are one operator
(see `op_facts`), and what reads no floating point value does not count, on either side: an index
may be computed another way than it was traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.core.op_facts import facts_of
from amp_convert.core.precision import Precision
from amp_convert.rules.rule import Category, MadeFor, Painting, Target
from amp_convert.rules.rule_set import Place, Rules


@dataclass(frozen=True)
class Treatment:
    """How a call's arguments are brought to one dtype, and the value that finite FP32 ones and
    numbers below it are raised to before they become low, or None."""

    precision: Precision
    clamp: float | None = None


class Treatments:
    """Those of one mode."""

    def __init__(self, rules: Rules, made_for: MadeFor, mode: Mode) -> None:
        self._rules, self._place = rules, Place(made_for.dtype, made_for.device, mode)
        self._words = _PAINTED[rules.painting]
        self._by_op: dict[str, Treatment] = {}
        lowest = -torch.finfo(from_name(made_for.dtype)).max / 2
        nodes: dict[tuple[str, str], list[Treatment]] = {}
        for rule in rules.rules:
            if rule.target is not Target.NODE or not self._place.is_covered_by(rule):
                continue
            layer, _, rest = rule.pattern.rpartition("/")
            precision = self._words[rule.category]
            if rule.pattern in made_for.rescaled:
                precision = Precision.FULL  # its factor is of use only where all calls are known
            clamp = lowest if rule.pattern in made_for.clamped else None
            key = (layer, facts_of(rest.rpartition("#")[0]).name)
            nodes.setdefault(key, []).append(Treatment(precision, clamp))
        self.exact = rules.painting is Painting.AUTOCAST or not any(
            each.precision is Precision.LOW for known in nodes.values() for each in known
        )
        """Whether the bits are to be those of PyTorch itself."""
        self._nodes: Mapping[tuple[str, str], Sequence[Treatment]] = nodes

    def of_node(self, layer: str, op: str, ordinal: int) -> Treatment | None:
        """That of the `ordinal`-th call of an operator, by its folded name, in a layer; None for
        one that the plan has not."""
        known = self._nodes.get((layer, op), ())
        return known[ordinal] if ordinal < len(known) else None

    def of_op(self, op: str) -> Treatment:
        """That of an operator, by the rule for it."""
        if op not in self._by_op:
            rule = self._rules.match_op(self._place, op)
            category = rule.category if rule is not None else Category.DENY
            self._by_op[op] = Treatment(self._words[category])
        return self._by_op[op]


_ALONE = {
    Category.ALLOW: Precision.LOW,
    Category.DENY: Precision.FULL,
    Category.INFER: Precision.WIDEST,
    Category.CLEAR: Precision.AS_IS,
}
_PAINTED = {
    Painting.AUTOCAST: _ALONE,
    # What a painted call reads is of one colour; alone it cannot see its neighbours.
    Painting.GRAPPLER: {**_ALONE, Category.CLEAR: Precision.WIDEST},
}
