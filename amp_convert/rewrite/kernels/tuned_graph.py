"""A rewritten graph -> the graph that runs in inference, by one pass after the other.

Passes change kernels and never precisions. Where the plan asks for PyTorch's own casts or for none
(`exact`), those that could change a bit are left out, so that `rules="fp32"` and `rules="autocast"`
give what eager gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from amp_convert.capture.graph_signature import Signature, Source
from amp_convert.capture.stored_graph import StoredGraph, restored, stored
from amp_convert.rewrite.kernels import (
    attention,
    batch_norm,
    bindings,
    casts,
    empty_parts,
    grouped_attention,
    in_place,
    products,
    sizes_alone,
)

_ALLOCATING: frozenset[object] = frozenset({products.folded_linear})


def tuned(graph_module: fx.GraphModule, signature: Signature, *, exact: bool) -> fx.GraphModule:
    """A copy of `graph_module` for calls without gradients; `signature` is the graph's."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node, spec in signature.placeholders(graph).items():
        node.meta["user"] = spec.source is Source.USER
    modules: dict[str, nn.Module] = {}
    batch_norm.call_as_eager(graph)
    empty_parts.drop(graph)
    attention.share_masks(graph, modules)
    if not exact:
        grouped_attention.group(graph)
        sizes_alone.erase_unread(graph)
    sizes_alone.remember(graph, modules)
    if not exact:
        casts.merge(graph)
        products.fold(graph)
    in_place.write(graph, _ALLOCATING)
    bindings.bind(graph)
    graph.lint()
    root = {str(n.target): _attribute(graph_module, n) for n in graph.find_nodes(op="get_attr")}
    return fx.GraphModule({**root, **modules}, graph)


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


class RunningGraph:
    """A graph in two forms: tuned, for calls without gradients, and as it was, for the others, for
    compilers, which tune for themselves, and for tensors without values, which tell no mask."""

    def __init__(self, plain: fx.GraphModule, signature: Signature, *, exact: bool) -> None:
        self.plain, self._signature, self._exact = plain, signature, exact
        self.tuned = tuned(plain, signature, exact=exact)
        users = [i for i, spec in enumerate(signature.inputs) if spec.source is Source.USER]
        others = [i for i in range(len(signature.inputs)) if i not in users]
        # A model's own tensors have values or not all together.
        self._watched = (*users, *others[:1])

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_transformed():
            return self.plain(*inputs)
        if any(_unreal(inputs[i]) for i in self._watched):
            return self.plain(*inputs)
        return self.tuned(*inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (stored(self.plain), self._signature, self._exact)


def _restored(data: StoredGraph, signature: Signature, exact: bool) -> RunningGraph:
    return RunningGraph(restored(data), signature, exact=exact)


def _is_transformed() -> bool:
    """Whether `torch.func` transforms the call: its tensors hide how many values they hold."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _unreal(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, FakeTensor))
