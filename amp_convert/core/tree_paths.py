"""The leaves of nested containers with the paths to them, whatever registered the containers."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


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
