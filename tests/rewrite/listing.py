"""What tests of this folder share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.rewrite.insert_casts import Rewritten


def listing(rewritten: Rewritten) -> list[str]:
    """A line a node that is not an input, such as "linear0 = linear(x.f16, p_weight.f16)".

    Constants are left out. A cast that was inserted is called after what it casts: "x.f16 = x".
    """
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in rewritten.graph_module.graph.nodes:
        args = [names[leaf] for leaf in read_by(node)]
        if node.name in rewritten.casts:
            short = {torch.float16: "f16", torch.float32: "f32"}[node.kwargs["dtype"]]
            names[node] = f"{args[0]}.{short}"
            lines.append(f"{names[node]} = {args[0]}")
        elif node.op == "output":
            lines.append(f"return {', '.join(args)}")
        elif node.op == "placeholder":
            names[node] = node.name
        else:
            op = str(getattr(node.target, "_opname", "getitem"))
            names[node] = f"{op}{counts[op]}"
            counts[op] += 1
            made = f"{args[0]}[{node.args[1]}]" if op == "getitem" else f"{op}({', '.join(args)})"
            lines.append(f"{names[node]} = {made}")
    return lines


def read_by(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def readers(rewritten: Rewritten, op: str) -> list[fx.Node]:
    return [
        n
        for n in rewritten.graph_module.graph.nodes
        if n.op == "call_function" and op in str(n.target)
    ]
