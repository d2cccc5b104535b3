"""Dimensions that the user says vary: `{"input_ids": {1: "length"}}`, by input and dimension.

A dimension varies where further calls differ in it (see `export_call.varying`), so what is said
becomes one more call, in which these dimensions are larger. Values are repeated, so that they stay
such as the model takes. Dimensions of one name have one size.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Call, Captured, FixedSizes
from amp_convert.capture.export_call import bound_arguments
from amp_convert.core.errors import ModelError
from amp_convert.core.mode import Mode
from amp_convert.core.spelling import nearest
from amp_convert.core.tree_paths import leaves_by_path

Said = Mapping[str, Mapping[int, str]]
_log = logging.getLogger(__name__)
_MEND = 'Write it as {"input_ids": {1: "length"}}.'


def larger_call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    said: Said,
    *,
    doubled: bool = False,
) -> Call:
    """A call like this one, larger by one where sizes are `said` to vary, or twice as large. Raises
    ModelError for inputs and dimensions that are not there, and for dimensions of one name that
    differ in size."""
    tensors = _tensors(model, args, kwargs)
    sizes: dict[str, tuple[int, str]] = {}
    grown: dict[int, torch.Tensor] = {}
    for name, dimensions in said.items():
        if name not in tensors:
            near = nearest(name, tensors)
            mend = f"Did you mean {near}?" if near else f"There are: {', '.join(tensors)}."
            raise ModelError(f"dynamic names the input {name}, which is not there", mend=mend)
        tensor = tensors[name]
        for d, label in dimensions.items():
            if not 0 <= d < tensor.dim() or not tensor.shape[d]:
                what = f"dynamic names dimension {d} of {name}, of shape {tuple(tensor.shape)}"
                raise ModelError(what, mend="Give a dimension that it has, and that is not empty.")
            size, first = sizes.setdefault(label, (tensor.shape[d], f"{name}[{d}]"))
            if size != tensor.shape[d]:
                raise ModelError(
                    f"dynamic calls both {first} and {name}[{d}] {label!r}, and they are "
                    f"{size} and {tensor.shape[d]} in the example",
                    mend="Give sizes that differ names of their own.",
                )
            now = grown.get(id(tensor), tensor)
            more = now if doubled else now.narrow(d, size - 1, 1)
            grown[id(tensor)] = torch.cat([now, more], d)
    made: Call = pytree.tree_map_only(
        torch.Tensor, lambda t: grown.get(id(t), t), (tuple(args), dict(kwargs))
    )
    return made


def held(captured: Captured, said: Said) -> Captured:
    """What was captured, with what was said to vary and is fixed all the same; that is logged. A
    size varies that can be larger by one, or, where it has to be a multiple, twice as large."""
    call = (captured.model, captured.args, captured.kwargs, said)
    unfit, other = (captured.takes(*larger_call(*call, doubled=d)) for d in (False, True))
    if not unfit or not other:
        return captured
    reason = f"sizes do not vary as was said: {unfit}"
    _log.warning("%s", reason)
    return dataclasses.replace(captured, unmet=(FixedSizes("", Mode.EVAL, reason),))


def checked(value: object) -> Said:
    """`value`, which has the form of what is said. Raises ModelError for any other."""
    if isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(dimensions, Mapping)
        and all(type(d) is int and isinstance(label, str) for d, label in dimensions.items())
        for name, dimensions in value.items()
    ):
        return value
    raise ModelError(f"dynamic is {value!r}", mend=_MEND)


def _tensors(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a call, as the graph's inputs are called."""
    bound = bound_arguments(model, args, kwargs).arguments
    named = {name + path: v for name, each in bound.items() for path, v in leaves_by_path(each)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
