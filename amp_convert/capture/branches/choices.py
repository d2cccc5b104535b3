"""Which nodes of a graph with both branches of a condition a run computes: those of one branch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

from torch import fx

CHOICE = "choice"
"""The key in the metadata of an `aten.where` that takes the results of one branch: the name of the
condition."""

BRANCH = "branch"
"""The key in the metadata of a node in a branch: pairs of a condition's name and the place of the
branch's results among the arguments of `aten.where`, 1 or 2, the outermost condition first."""


class Untaken(Enum):
    """What stands for the value of a node in a branch that a run does not take."""

    UNTAKEN = "untaken"


UNTAKEN = Untaken.UNTAKEN


class Choices:
    """Which nodes of a graph with conditions, captured or rewritten, a run computes."""

    def __init__(self, graph: fx.Graph) -> None:
        self._conditions = {n.meta[CHOICE]: n.args[0] for n in graph.nodes if CHOICE in n.meta}

    def instead(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What a node gives without being run: `UNTAKEN`, or a choice's result; None where it is to
        be run. `values` are those of the nodes before it."""
        if not self._conditions:
            return None
        for name, side in node.meta.get(BRANCH, ()):
            if bool(values[self._conditions[name]]) != (side == 1):
                return UNTAKEN
        if CHOICE in node.meta:
            condition, one, other = cast(tuple[Any, ...], node.args)
            return values[one if values[condition] else other]
        # A cast of what was not computed, which no branch was told of.
        return UNTAKEN if any(values.get(n) is UNTAKEN for n in node.all_input_nodes) else None


class OneBranch(fx.Interpreter):
    """Runs a graph node by node, and of its branches those that are taken."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._choices = Choices(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        instead = self._choices.instead(n, self.env)
        return super().run_node(n) if instead is None else instead
