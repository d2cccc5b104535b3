"""A rewritten graph -> the graph that runs, by one pass after the other.

Passes change kernels and never precisions. Where the plan asks for PyTorch's own casts or for none
(`exact`), those that could change a bit are left out, so that `rules="fp32"` and `rules="autocast"`
give what eager gives.

There are three forms. `tuned` is for calls without gradients. `trained` is for training: autograd
differentiates it, so nothing may be written over that autograd saves, and no sum of gradients is
moved into a lower precision; weights are cast together, and buffers are written where they are.
`deployed` is for those who trace it, such as torch.export: it looks at no values, keeps nothing
from call to call and writes nothing in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from amp_convert.capture.branches.nest import nest, one_branch
from amp_convert.capture.graph_signature import InputSpec, Signature, Source
from amp_convert.capture.stored_graph import StoredGraph, restored, stored
from amp_convert.core.folded_linear import folded_linear
from amp_convert.rewrite.kernels import (
    attention,
    batch_norm,
    bindings,
    buffer_updates,
    casts,
    empty_parts,
    grouped_attention,
    in_place,
    products,
    sizes_alone,
    weight_casts,
    whole_slices,
)
from amp_convert.rewrite.kernels.transforms import autocasting, is_plain_call

_ALLOCATING: frozenset[object] = frozenset({folded_linear})


def tuned(graph_module: fx.GraphModule, signature: Signature, *, exact: bool) -> fx.GraphModule:
    """A copy of `graph_module` for calls without gradients; `signature` is the graph's."""
    graph, _ = _copied(graph_module, signature)
    modules: dict[str, nn.Module] = {}
    nest(graph, modules)
    empty_parts.drop(graph)
    _as_eager_calls(graph, modules, exact=exact)
    if not exact:
        casts.merge(graph)
        products.fold(graph)
    in_place.write(graph, _ALLOCATING)
    bindings.bind(graph)
    return _module(graph, graph_module, modules)


def deployed(graph_module: fx.GraphModule, signature: Signature, *, exact: bool) -> fx.GraphModule:
    """A copy of `graph_module` for tracing; `signature` is the graph's."""
    graph, _ = _copied(graph_module, signature)
    modules: dict[str, nn.Module] = {}
    empty_parts.drop(graph)
    batch_norm.call_as_eager(graph)
    whole_slices.drop(graph)
    if not exact:
        grouped_attention.group(graph)
        sizes_alone.erase_unread(graph)
        casts.merge(graph)
        products.fold(graph)
    return _module(graph, graph_module, modules)


def trained(
    graph_module: fx.GraphModule, signature: Signature, *, exact: bool
) -> tuple[fx.GraphModule, frozenset[int]]:
    """A copy of `graph_module` for training, and the inputs, by number, that it writes to itself:
    these buffers need no copy before the call, and it returns them as they are."""
    graph, placeholders = _copied(graph_module, signature)
    modules: dict[str, nn.Module] = {}
    nest(graph, modules)
    written = buffer_updates.write(graph, placeholders, signature.buffer_outputs)
    leaves = [n for n, spec in placeholders.items() if spec.source is not Source.CONSTANT]
    empty_parts.drop(graph, leaves)
    _as_eager_calls(graph, modules, exact=exact)
    if not exact:
        casts.merge(graph, move=False)
        products.fold(graph)
    weight_casts.group(graph, placeholders)
    in_place.write(graph, differentiable=True)
    bindings.bind(graph)
    return _module(graph, graph_module, modules), written


def _as_eager_calls(graph: fx.Graph, modules: dict[str, nn.Module], *, exact: bool) -> None:
    batch_norm.call_as_eager(graph)
    whole_slices.drop(graph)
    attention.share_masks(graph, modules)
    if not exact:
        grouped_attention.group(graph)
        sizes_alone.erase_unread(graph)
    sizes_alone.remember(graph, modules)


def _copied(
    graph_module: fx.GraphModule, signature: Signature
) -> tuple[fx.Graph, dict[fx.Node, InputSpec]]:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    placeholders = signature.placeholders(graph)
    for node, spec in placeholders.items():
        node.meta["user"] = spec.source is Source.USER
    return graph, placeholders


def _module(
    graph: fx.Graph, graph_module: fx.GraphModule, modules: dict[str, nn.Module]
) -> fx.GraphModule:
    graph.lint()
    root = {str(n.target): _attribute(graph_module, n) for n in graph.find_nodes(op="get_attr")}
    return fx.GraphModule({**root, **modules}, graph)


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


class RunningGraph:
    """A graph in two forms: as it was, and one that is tuned for what it is for: for calls without
    gradients, or for training. As it was it runs otherwise, where the call is no plain one (see
    `transforms`; compilers tune for themselves), and for tensors without values, which tell no
    mask. One branch of a condition is computed wherever somebody can tell which.

    The caller's autocast is off in it: what the plan has decided, none other may decide again.

    `in_place` are the inputs that the tuned form writes to itself; it wants them as they are, not
    copies.
    """

    def __init__(
        self, plain: fx.GraphModule, signature: Signature, *, exact: bool, training: bool = False
    ) -> None:
        self.plain, self._signature = plain, signature
        self._exact, self._training = exact, training
        self.in_place: frozenset[int] = frozenset()
        if training:
            self.tuned, self.in_place = trained(plain, signature, exact=exact)
        else:
            self.tuned = tuned(plain, signature, exact=exact)
        self._one_branch = one_branch(plain)
        users = [i for i, spec in enumerate(signature.inputs) if spec.source is Source.USER]
        others = [i for i in range(len(signature.inputs)) if i not in users]
        # A model's own tensors have values or not all together.
        self._watched = (*users, *others[:1])

    def __call__(self, *inputs: Any) -> Any:
        for device in autocasting(inputs[i] for i in self._watched):
            with torch.autocast(device, enabled=False):
                return self(*inputs)  # which looks at the next device
        return self._run(*inputs)

    def _run(self, *inputs: Any) -> Any:
        compiled, plain = torch.compiler.is_compiling(), is_plain_call()
        real = not any(_unreal(inputs[i]) for i in self._watched)
        if plain and real and (self._training or not torch.is_grad_enabled()):
            return self.tuned(*inputs)
        graph = self._one_branch if compiled or (plain and real) else self.plain
        return graph(*(x.clone() if i in self.in_place else x for i, x in enumerate(inputs)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (stored(self.plain), self._signature, self._exact, self._training)


def _restored(data: StoredGraph, signature: Signature, exact: bool, training: bool) -> RunningGraph:
    return RunningGraph(restored(data), signature, exact=exact, training=training)


def _unreal(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, FakeTensor))
