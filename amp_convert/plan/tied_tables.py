"""Tables that are looked up and multiplied, such as an embedding that is the head as well."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from amp_convert.core.op_facts import facts_of_target
from amp_convert.core.precision import Precision


def is_table_low(
    lookup: fx.Node,
    tensors: Mapping[fx.Node, torch.Tensor | None],
    precision: Mapping[str, Precision],
) -> bool:
    """Whether something else than lookups reads the lookup's table in low precision: held in FP32
    for its entries, it would be held twice. `tensors` has what placeholders stand for,
    `precision` what each node computes in, by its FX name."""
    table = lookup.args[0]
    held = tensors.get(table) if isinstance(table, fx.Node) else None
    readers = [
        user
        for placeholder, tensor in tensors.items()
        if held is not None and tensor is held
        for user in placeholder.users
    ]
    return any(
        precision.get(user.name) is Precision.LOW and not facts_of_target(user.target).delivers_low
        for user in readers
    )
