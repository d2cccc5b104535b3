"""What a model gives, in the dtypes of the FP32 original."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def restored(value: Any, low: torch.dtype) -> Any:
    """`value` with FP32 in place of `low`: tensors, and those in tuples, lists, dicts and
    dataclasses. Other objects, such as a key-value cache, stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype is low else value
    is_record = is_dataclass(value) and not isinstance(value, type)
    if is_record:
        entries = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, dict):
        entries = dict(value)
    elif isinstance(value, list | tuple):
        entries = {str(i): each for i, each in enumerate(value)}
    else:
        return value
    new = {key: restored(each, low) for key, each in entries.items()}
    if all(new[key] is each for key, each in entries.items()):
        return value
    if isinstance(value, list | tuple):
        parts = new.values()
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    made: Any = copy.copy(value)
    for key, each in new.items():
        if is_record:
            object.__setattr__(made, key, each)
        if isinstance(value, dict):  # some are both, such as the outputs of transformers
            made[key] = each
    return made


def tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Those among the arguments of a call, in their order."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value, {})
    return found
