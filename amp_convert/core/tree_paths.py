"""The leaves of nested containers with the paths to them, whatever registered the containers: those
of torch's pytree, and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._pytree import tree_is_leaf, tree_map


def leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
    """Each leaf with its path, as in "[0]['mask']", in the order of `tree_flatten`.

    A library may have registered a class without saying what its entries are called, as diffusers
    does: then they go by their number among all leaves.
    """
    try:
        return [
            (pytree.keystr(keys), leaf) for keys, leaf in pytree.tree_flatten_with_path(tree)[0]
        ]
    except ValueError:
        return [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]


def named_leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested outputs in order, named by path: "logits", "[0]", "states[1].x".

    A value that is itself a leaf is called "output".
    """
    if isinstance(value, Mapping):
        children = [(f"{name}.{key}" if name else str(key), v) for key, v in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = [field.name for field in dataclasses.fields(value)]
        children = [(f"{name}.{key}" if name else key, getattr(value, key)) for key in keys]
    elif isinstance(value, tuple | list):
        children = [(f"{name}[{index}]", v) for index, v in enumerate(value)]
    elif not tree_is_leaf(value):  # a class that is registered with torch's pytree
        children = [(f"{name or 'output'}{path}", v) for path, v in leaves_by_path(value)]
    else:
        return [(name or "output", value)]
    return [leaf for key, child in children for leaf in named_leaves(child, key)]


def map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Nested outputs with every tensor changed, in containers of their own: those of torch's
    pytree, and dataclasses, which `named_leaves` looks into as well."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if not tree_is_leaf(value):
        return tree_map(lambda leaf: map_tensors(change, leaf), value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    made = copy.copy(value)
    for field in dataclasses.fields(value):
        new = map_tensors(change, getattr(value, field.name))
        object.__setattr__(made, field.name, new)
    return made
