"""Which values are whose memory: what the passes over a running graph must know before they let one
value stand for another, or be written over.

Only PyTorch's own operators are believed: a custom one may say of itself what is not so.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_OWN = ("aten", "prims")
# Made of other operators, these still allocate their results. Of others of that kind, some give
# their argument back: `dropout`, `contiguous`, `einsum`.
_ALLOCATE = {
    aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default,
    torch.nn.functional.batch_norm,
}  # fmt: skip
_GIVES_BACK = {aten.dequantize.self}


def allocates(target: object, allocating: frozenset[object] = frozenset()) -> bool:
    """Whether the result of an operator is its own, and no part of what it was given; `allocating`
    are functions of our own of which that holds."""
    if target in allocating or target in _ALLOCATE:
        return True
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1:
        return False
    if target.namespace not in _OWN or target in _GIVES_BACK:
        return False
    if any(r.alias_info is not None for r in target._schema.returns):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )


def is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same for the same arguments, and does nothing else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        writes = any(
            a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments
        )
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        return target.namespace in _OWN and not writes and not drawn
    return getattr(target, "__module__", "") in ("_operator", "math", "torch", "builtins")


def reaches_output(node: fx.Node) -> bool:
    """Whether the caller may get this value, or a view of it."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and not allocates(user.target):
                seen.add(user)
                stack.append(user)
    return False
