"""Decisions made by hand: of a plan, or as a report has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amp_convert.plan.plan import Decision, DecisionKind, PlannedInput
from amp_convert.rules.rule_set import Category

LOW = "float16"


def decision(node: str, /, **changes: Any) -> Decision:
    """A linear layer that computes in float16 by the default rules, unless `changes` say otherwise.

    Besides its fields these may be given: `low`, whether it computes in float16; `category` as in a
    report, "none" and "unknown" included; and `input_dtypes`, one a tensor argument.
    """
    layer, _, op = node.partition("/")
    base = Decision(
        node=node,
        name=layer.replace(".", "_"),
        layer=layer,
        module="torch.nn.modules.linear.Linear",
        op=op.partition("#")[0],
        location="model.py:41",
        kind=DecisionKind.RULE,
        category=Category.ALLOW,
        precision=LOW,
        dtype=LOW,
        rule="op aten.linear",
        reason="matrix product",
        source="default.toml:12",
        evidence="",
        macs=1000,
        inputs=(PlannedInput("input", LOW), PlannedInput("weight")),
        output_dtype=None,
        output_dtypes=(LOW,),
    )
    return changed(base, **changes)


def in_fp32(node: str, /, **changes: Any) -> Decision:
    """A node that stays FP32 because its op is denied."""
    kept = {
        "category": "deny",
        "dtype": "float32",
        "low": False,
        "macs": 0,
        "reason": "exp feeds a sum",
        "source": "default.toml:40",
        "input_dtypes": ("float32",),
        "output_dtypes": ("float32",),
    }
    return decision(node, **(kept | changes))


def changed(base: Decision, **changes: Any) -> Decision:
    """`base` with these fields, or what stands for them (see `decision`)."""
    if str(changes.get("rule", "")).startswith("guard"):
        changes.setdefault("kind", DecisionKind.GUARD)
    if "category" in changes and not isinstance(changes["category"], Category):
        kinds = {"none": DecisionKind.NONE, "unknown": DecisionKind.UNKNOWN}
        category = changes.pop("category")
        missing = kinds.get(category)
        changes.setdefault("kind", missing or DecisionKind.RULE)
        changes["category"] = None if missing else Category(category)
        if missing is DecisionKind.NONE:
            changes.setdefault("precision", "")
            changes.pop("low", None)
    if "low" in changes:
        changes["precision"] = LOW if changes.pop("low") else "float32"
    if "input_dtypes" in changes:
        inputs = [PlannedInput("input", dtype) for dtype in changes.pop("input_dtypes")]
        changes["inputs"] = tuple(inputs)
    return replace(base, **changes)
