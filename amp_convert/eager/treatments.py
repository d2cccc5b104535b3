"""Saved rules of a plan -> what is done to each call of a running model. Plain data.

A call is identified as a node of the plan is: by the layer that makes it, by its operator, and by
its place among that layer's calls of that operator. Names that compute the same are one operator
(see `op_facts`), and what reads no floating point value does not count, on either side: an index
may be computed another way than it was traced.

Running code may call more or less than was traced: a loop, a branch, a result that nobody reads. So
the place counts only where it decides something: where all nodes of a layer and operator are
treated alike, each call is. Else the line of the user's code tells them apart, and on one line the
place among its calls. What is not told apart so is treated the safest way: in FP32, if one of them
is.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class _Nodes:
    """The treatments of the nodes of one layer and operator, with the line of each."""

    def __init__(self) -> None:
        self.treatments: list[Treatment] = []
        self.lines: dict[str, list[Treatment]] = {}

    def add(self, treatment: Treatment, line: str) -> None:
        self.treatments.append(treatment)
        self.lines.setdefault(line, []).append(treatment)

    @property
    def agree(self) -> bool:
        return len(set(self.treatments)) == 1

    def at(self, line: str, ordinal: int) -> Treatment:
        """That of the `ordinal`-th call on a line."""
        here = self.lines.get(line, [])
        if here and (len(set(here)) == 1 or ordinal < len(here)):
            return here[min(ordinal, len(here) - 1)]
        return _safest(here or self.treatments)


def _safest(treatments: Sequence[Treatment]) -> Treatment:
    order = (Precision.FULL, Precision.WIDEST, Precision.AS_IS, Precision.LOW)
    precision = min((each.precision for each in treatments), key=order.index)
    return Treatment(precision, next((t.clamp for t in treatments if t.clamp is not None), None))


class Treatments:
    """Those of one mode."""

    def __init__(self, rules: Rules, made_for: MadeFor, mode: Mode) -> None:
        self._rules, self._place = rules, Place(made_for.dtype, made_for.device, mode)
        self._words = _PAINTED[rules.painting]
        self._by_op: dict[str, Treatment] = {}
        lowest = -torch.finfo(from_name(made_for.dtype)).max / 2
        self._nodes: dict[tuple[str, str], _Nodes] = {}
        for rule in rules.rules:
            if rule.target is not Target.NODE or not self._place.is_covered_by(rule):
                continue
            layer, _, rest = rule.pattern.rpartition("/")
            precision = self._words[rule.category]
            if rule.pattern in made_for.rescaled:
                precision = Precision.FULL  # its factor is of use only where all calls are known
            clamp = lowest if rule.pattern in made_for.clamped else None
            key = (layer, facts_of(rest.rpartition("#")[0]).name)
            self._nodes.setdefault(key, _Nodes()).add(Treatment(precision, clamp), rule.location)
        self.exact = rules.painting is Painting.AUTOCAST or not any(
            each.precision is Precision.LOW
            for known in self._nodes.values()
            for each in known.treatments
        )
        """Whether the bits are to be those of PyTorch itself."""
        self._alike = {key: n.treatments[0] for key, n in self._nodes.items() if n.agree}

    def count(self, layer: str, op: str) -> int:
        """How many nodes of an operator, by its folded name, the plan has in a layer."""
        known = self._nodes.get((layer, op))
        return len(known.treatments) if known is not None else 0

    def alike(self, layer: str, op: str) -> Treatment | None:
        """That of each call of an operator in a layer, where all are treated alike; None where they
        are not, or where the plan has none."""
        return self._alike.get((layer, op))

    def at(self, layer: str, op: str, line: str, ordinal: int) -> Treatment:
        """That of the `ordinal`-th call on a line, where the nodes are not all treated alike."""
        return self._nodes[layer, op].at(line, ordinal)

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
