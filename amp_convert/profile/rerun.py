"""Running a node of a captured graph once more, on other values: which may, and how.

A node may where doing so changes nothing and gives the same result. See `rounding_trials`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import BRANCH, CHOICE
from amp_convert.core.op_facts import Family, facts_of_target


def can_be_tried(node: fx.Node) -> bool:
    """Whether a node computes new values: it is no view, and picks nothing from a tuple."""
    if not isinstance(node.target, torch._ops.OpOverload) or not repeatable(node):
        return False
    return all(returned.alias_info is None for returned in node.target._schema.returns)


def repeatable(node: fx.Node) -> bool:
    """Whether running a node once more changes nothing, and gives the same result. Nobody knows
    that of a custom operator; memory that is not written yet holds something else each time; what
    is in a branch of a condition, or chooses one, is not always there."""
    if BRANCH in node.meta or CHOICE in node.meta:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") == "_operator"
    if node.target.namespace != "aten" or node.target._schema.is_mutable:
        return False
    if facts_of_target(node.target).is_a(Family.UNWRITTEN):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return True
    arguments = _arguments(node)
    return arguments.get("train") is False or arguments.get("dropout_p") == 0


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names in its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    names = [a.name for a in schema.arguments]
    return {**found, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def kept_inputs(node: fx.Node) -> set[fx.Node]:
    """The inputs that a low node reads in FP32 on some device."""
    kept = facts_of_target(node.target).kept_arguments("cpu")
    given = {n: a for n, a in _arguments(node).items() if n in kept}
    return {leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Node)}


def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]
