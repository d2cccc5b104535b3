"""Hand-made sites, and what a guard does to a plan and to a converted model."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from amp_convert.plan.guards import Consumer, Guard, GuardFinding, Operand, Site
from amp_convert.plan.plan import Plan
from amp_convert.profile.calibrate import Range
from amp_convert.rules.rule_set import GuardLimits, Rules
from tests import staged
from tests.staged import F16, Staged, table

NAN, INF = math.nan, math.inf
LARGEST, LARGEST_BF16 = 65504.0, torch.finfo(torch.bfloat16).max
SMALLEST = 2.0**-14
"""FP16's smallest normal number."""


def above(value: float) -> float:
    """The next number up."""
    return math.nextafter(value, INF)


def below(value: float) -> float:
    """The next number down."""
    return math.nextafter(value, -INF)


# --- by hand -------------------------------------------------------------------------------------


def seen(value: float, *, tiny: float | None = None, integral: bool = False) -> Range:
    """The range of a tensor that holds 0 and `value`."""
    return Range(abs(value), max(value, 0.0) if value == value else value, tiny, integral)


def activation(value: float, argument: str = "self", *, integral: bool = False) -> Operand:
    return Operand(argument, seen(value, integral=integral))


def weight(value: float, tiny: float | None = 0.0, name: str = "encoder.weight") -> Operand:
    return Operand("weight", seen(value, tiny=tiny), weight=name)


def reader(
    op: str, argument: str = "self", operand: float | None = None, result: float | None = None
) -> Consumer:
    """A node that reads the site's value."""
    ranges = [seen(value) if value is not None else None for value in (operand, result)]
    return Consumer(f"aten.{op}", argument, *ranges)


def site(op: str, **fields: Any) -> Site:
    """A site; `result` may be given as a number."""
    if isinstance(fields.get("result"), float):
        fields["result"] = seen(fields["result"])
    return Site(f"aten.{op}", **fields)


def finding(guard: Guard, at: Site, dtype: torch.dtype = F16, **limits: Any) -> GuardFinding | None:
    """What a guard says with the default limits, but for those given."""
    return guard.find(at, replace(GuardLimits(), **limits), dtype)


def said(
    guard: Guard, at: Site, dtype: torch.dtype = F16, **limits: Any
) -> tuple[str, str, str] | None:
    """Its name, its reason and its evidence in words, if it fires."""
    found = finding(guard, at, dtype, **limits)
    if found is None:
        return None
    # The number that fired is on the wrong side of its limit, or none at all.
    small = found.guard in ("epsilon", "activation-floor", "constant")
    inside = found.limit <= abs(found.measured) if small else found.measured <= found.limit
    assert not inside or abs(found.measured) > torch.finfo(dtype).max
    return found.guard, found.reason, found.evidence


def fires(guard: Guard, at: Site, dtype: torch.dtype = F16, **limits: Any) -> bool:
    return finding(guard, at, dtype, **limits) is not None


# --- whole models --------------------------------------------------------------------------------


def diagonal(factor: float, size: int = 4) -> nn.Linear:
    """A linear layer that multiplies by `factor`."""
    layer = nn.Linear(size, size, bias=False)
    nn.init.eye_(layer.weight).data.mul_(factor)
    return layer


def chain(**layers: nn.Module) -> nn.Sequential:
    """Named layers, one after the other."""
    return nn.Sequential(OrderedDict(layers))


def spread(*shape: int, low: float = 0.5, high: float = 1.0) -> torch.Tensor:
    """Numbers from `low` to `high`, evenly spread."""
    return torch.linspace(low, high, torch.Size(shape).numel()).reshape(shape)


def guarded(plan: Plan) -> dict[str, str]:
    """The nodes that a guard keeps in FP32, without "aten.", and the guard."""
    return {
        d.node.replace("aten.", ""): d.rule.removeprefix("guard ")
        for d in plan.eval
        if d.rule.startswith("guard ")
    }


def all_low(plan: Plan) -> bool:
    return plan.low_nodes() == plan.decided_nodes()


def b16_table(plan: Plan) -> list[str]:
    """`table` of a BF16 plan."""
    with mock.patch.dict(staged.SHORT, bfloat16="b16"):
        return table(plan)


def error(
    of: Staged, rules: Rules | str = "default", dtype: torch.dtype = F16, *args: Any
) -> float:
    """The converted model's relative L2 error, on the example inputs unless others are given."""
    args = args or of.args
    mixed = of.convert(rules, dtype).eval()
    with torch.no_grad():
        want, have = of.model.eval()(*args).double(), mixed(*args).double()
    return float((have - want).norm() / want.norm()) if have.isfinite().all() else INF
