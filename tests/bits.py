"""Whether two results have the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def leaves(tree: Any) -> dict[str, Any]:
    """What a model returned, by path: tensors and whatever else is in there."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_same_bits(want: Any, have: Any) -> None:
    """Two trees of one structure, whose tensors have the same dtypes, shapes and bits."""
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    found = leaves(have)
    for path, expected in leaves(want).items():
        if isinstance(expected, torch.Tensor):
            assert (found[path].dtype, found[path].shape) == (expected.dtype, expected.shape), path
            assert same_bits(expected, found[path]), path
        else:
            assert found[path] == expected, path


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bytes: unlike ==, NaN is NaN, 0 is not -0."""
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
