"""BatchNorms folded into the weights of the products before them, as the plan says.

The new weights are computed in the graph, from the FP32 ones and in FP64; constant folding stores
what they come to. Keeps: every shape and dtype. Does not keep bits: a rounding is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from amp_convert.plan.batch_norm_folds import factor_shape, folded_weights
from amp_convert.plan.plan import BatchNormFold
from amp_convert.rewrite.insert_casts import Rewritten

aten = torch.ops.aten


def fold_batch_norms(
    rewritten: Rewritten, copied: Mapping[fx.Node, fx.Node], folds: Iterable[BatchNormFold]
) -> None:
    """Fold in a copy of the rewritten eval graph; `copied` has the copy of each node."""
    names = {info.identity: name for name, info in rewritten.captured.nodes.items()}
    for fold in folds:
        if not fold.reason and {fold.product, fold.norm} <= names.keys():
            product, norm = (
                copied[rewritten.values[names[identity]]] for identity in (fold.product, fold.norm)
            )
            layer = fold.product.rpartition("/")[0].replace(".", "_")
            _fold(product, norm, layer or product.name)


def _fold(product: fx.Node, norm: fx.Node, name: str) -> None:
    """Fold one pair; `name` is what its weights are called. Not as the original's are: what reads
    those somewhere else is to find them as they were."""
    graph, dtype = product.graph, product.meta["dtype"]
    weight, bias = (_wide_source(a) for a in (*product.args[1:3], None)[:2])
    given = tuple(_wide_source(argument) for argument in norm.args[1:5])
    eps = norm.args[6]
    assert isinstance(weight, fx.Node)
    assert isinstance(eps, float)
    with graph.inserting_before(product):

        def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return graph.call_function(op, args, kwargs)

        shape = factor_shape(product, len(weight.meta["shape"]))
        wide = folded_weights(call, (weight, bias), given, eps, shape)  # type: ignore[arg-type]
        stored = [
            graph.create_node(
                "call_function", aten._to_copy.default, (value,), {"dtype": dtype},
                name=f"{name}_{part}",
            )
            for value, part in zip(wide, ("weight", "bias"), strict=True)
        ]  # fmt: skip
    for node, like in zip(stored, (weight, bias or given[1] or given[2]), strict=True):
        assert like is not None
        node.meta = {"dtype": dtype, "shape": like.meta.get("shape")}
    product.args = (product.args[0], *stored, *product.args[3:])
    for reader in list(norm.users):  # the BatchNorm gives a tuple
        reader.replace_all_uses_with(product)
        graph.erase_node(reader)
    graph.erase_node(norm)


def _wide_source(argument: Any) -> fx.Node | None:
    """The FP32 tensor behind a cast."""
    while isinstance(argument, fx.Node) and argument.target is aten._to_copy.default:
        argument = argument.args[0]
    return argument if isinstance(argument, fx.Node) else None
