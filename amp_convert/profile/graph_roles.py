"""What a node is to the nodes around it: a router, a running sum."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from amp_convert.capture.captured import Value
from amp_convert.core.op_facts import Family, facts_of_target


def routes(node: fx.Node, values: Mapping[str, Any]) -> bool:
    """Whether a node ranks, and which values are the largest decides what is computed: its indices
    get to more than selections whose results the model returns."""

    def is_float(node: fx.Node) -> bool:
        recorded = values.get(node.name)
        return isinstance(recorded, Value) and recorded.dtype.is_floating_point

    if not facts_of_target(node.target).is_a(Family.RANKING) or is_float(node):
        return False
    pending = [u for u in node.users if u.target is not operator.getitem or not is_float(u)]
    seen: set[fx.Node] = set()
    while pending:
        user = pending.pop()
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        facts = facts_of_target(user.target)
        if is_float(user) and not (facts.moves or facts.is_a(Family.CAST)):
            return True
        pending += user.users
    return False


def is_running(value: fx.Node, reader: fx.Node) -> bool:
    """Whether a sum's larger term is a value that sums add to one after the other: it is an
    input of the model or the result of a sum, or the result is added to again."""

    def is_sum(node: fx.Node) -> bool:
        return facts_of_target(node.target).is_a(Family.SUM)

    while value.op == "call_function" and facts_of_target(value.target).is_a(
        Family.SHAPE, Family.COPY, Family.DROPOUT
    ):
        value = value.all_input_nodes[0]
    return value.op == "placeholder" or is_sum(value) or any(map(is_sum, reader.users))
