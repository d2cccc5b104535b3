"""What tests of this folder share."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.core.op_facts import facts_of_target
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Rule, Rules
from tests.op_samples import (
    Call,
)
from tests.staged import F16, F32

aten = torch.ops.aten


def default_rule(name: str, dtype: torch.dtype = F16, device: str = "cpu") -> Rule | None:
    place = Place(str(dtype).removeprefix("torch."), device, "eval")
    return load_default().match_op(place, name)


@functools.lru_cache(maxsize=1)
def load_default() -> Rules:
    """The preset `default` with its guards off: this is about the lists."""
    return replace(load_rules(["default"]), guards=load_rules(["fp32"]).guards)


def category(name: str, low: torch.dtype = F16, device: str = "cpu") -> str | None:
    found = default_rule(name, low, device)
    return found and found.category.value


def is_untouched(call: Call) -> bool:
    """Whether not even an override has the node cast: it reads raw memory, or it is the model's own
    cast."""
    return call.op is aten.as_strided.default or (
        call.op is aten._to_copy.default and "dtype" in call.kwargs
    )


def by_hand(call: Call, low: torch.dtype) -> Any:
    """The operator on inputs cast as planned, or what it raises."""
    if is_untouched(call):
        return call.run()
    if facts_of_target(call.op).delivers_low:
        return call.run().to(low)
    kept = facts_of_target(call.op).kept_arguments("cpu")

    def cast(name: str, argument: Any) -> Any:
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(low) if t.dtype == F32 and name not in kept else t,
            argument,
        )

    names = [argument.name for argument in call.op._schema.arguments]
    args = tuple(cast(name, a) for name, a in zip(names, call.args, strict=False))
    kwargs = {name: cast(name, a) for name, a in call.kwargs.items()}
    try:
        return Call(call.op, args, kwargs).run()
    except (RuntimeError, TypeError, ValueError) as error:
        return error
