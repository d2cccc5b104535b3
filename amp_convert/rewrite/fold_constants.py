"""Constant folding for inference: what depends on weights alone is computed once.

What happens to the eval graph:

0. Where it is asked for, BatchNorms go into the weights before them (see `fold_batch_norm`).
1. A lookup whose result is cast (`cast(embedding(table, ids))`) becomes a lookup in a cast table:
   the same bits, since a lookup computes nothing.
2. Every value that is computed from parameters, buffers and constants alone, and that something
   else reads, becomes a stored tensor. Views are left in the graph: storing them would only cost
   memory.

Buffers that the graph itself changes are state, not constants, and stay as they are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from amp_convert.capture.graph_signature import InputSpec, Signature, Source
from amp_convert.core.number_formats import LOW_DTYPES, name_of, widened
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.plan.plan import BatchNormFold
from amp_convert.rewrite.fold_batch_norm import fold_batch_norms
from amp_convert.rewrite.insert_casts import Rewritten
from amp_convert.rewrite.kernels.aliasing import reaches_output
from amp_convert.rewrite.kernels.products import kernel_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Folded:
    """A graph whose constants are inputs, and those constants by the names in its signature."""

    graph_module: fx.GraphModule
    signature: Signature
    tensors: Mapping[str, torch.Tensor]


def fold(
    rewritten: Rewritten,
    tensors: Mapping[str, torch.Tensor],
    *,
    wide: bool = False,
    batch_norms: Iterable[BatchNormFold] = (),
    fold_products: bool = False,
) -> Folded:
    """Fold the eval graph; `tensors` holds every non-user input by placeholder name, `batch_norms`
    which are folded.

    With `wide`, what is stored has not been rounded: casts to a low dtype are to FP32 there, in the
    same places and by the same names. `fold_products` computes linear layers by the kernel that the
    tuned graph has for them (see `kernels.products`), or a constant would have other bits.
    """
    graph = _prepared(rewritten, batch_norms)
    return _Folder(graph, rewritten, tensors, wide=wide, fold_products=fold_products).run()


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the model's that folding will store, whole or in part, in some dtype, by the name
    that its graph has for it; `reader` is the first node that reads it at a call."""

    tensor: torch.Tensor
    name: str
    dtype: torch.dtype
    reader: fx.Node


def stored_weights(
    rewritten: Rewritten, held: Sequence[torch.Tensor | None]
) -> Iterator[StoredWeight]:
    """What folding the eval graph will store of the model's own tensors, without folding it;
    `held` are its inputs as `GraphRunner.tensors` gives them."""
    folder = _Folder(_prepared(rewritten, ()), rewritten, {})
    own = dict(zip(folder.placeholders, held, strict=True))
    for node, reader in folder.frontier().items():
        source = node
        while source not in own and (_is_cast(source) or _is_copy(source)):
            source = source.all_input_nodes[0]
        tensor = own.get(source)
        if tensor is not None and tensor.is_floating_point():
            dtype = node.kwargs["dtype"] if _is_cast(node) else tensor.dtype
            assert isinstance(dtype, torch.dtype)
            yield StoredWeight(tensor, folder.placeholders[source].target, dtype, reader)


def _prepared(rewritten: Rewritten, batch_norms: Iterable[BatchNormFold]) -> fx.Graph:
    """A copy of the eval graph, with what comes before its constants are computed."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(rewritten.graph_module.graph, copied))
    fold_batch_norms(rewritten, copied, batch_norms)
    for node in list(graph.nodes):
        _cast_table(graph, node)
    return graph


def _is_copy(node: fx.Node) -> bool:
    """Whether a node has the values of what it reads, or some of them."""
    facts = facts_of_target(node.target)
    return node.target is operator.getitem or _is_view(node) or facts.is_a(Family.COPY, Family.PART)


def _cast_table(graph: fx.Graph, cast: fx.Node) -> None:
    """Rule 1."""
    if not _is_cast(cast):
        return
    lookup = cast.args[0]
    if not isinstance(lookup, fx.Node) or not facts_of_target(lookup.target).delivers_low:
        return
    weight = lookup.args[0]
    assert isinstance(weight, fx.Node)
    if len(lookup.users) != 1 or cast.kwargs["dtype"] not in LOW_DTYPES:
        return
    if weight.op != "placeholder":  # its table is low already
        return
    with graph.inserting_before(lookup):
        table = graph.call_function(aten._to_copy.default, (weight,), dict(cast.kwargs))
    lookup.meta["dtype"] = cast.kwargs["dtype"]
    lookup.args = (table, *lookup.args[1:])
    cast.replace_all_uses_with(lookup)
    graph.erase_node(cast)


class _Folder:
    """Rule 2. `_known` holds the value of each constant node that was needed so far."""

    def __init__(
        self,
        graph: fx.Graph,
        rewritten: Rewritten,
        tensors: Mapping[str, torch.Tensor],
        *,
        wide: bool = False,
        fold_products: bool = False,
    ) -> None:
        self._graph, self._root, self._wide = graph, rewritten.graph_module, wide
        self._fold_products = fold_products
        self._signature = rewritten.captured.signature
        self._specs = self.placeholders = self._signature.placeholders(graph)
        self._placeholders = list(self._specs)
        originals = self._signature.placeholders(rewritten.graph_module.graph)
        self._known = {
            node: tensors[original.name]
            for node, original in zip(self._placeholders, originals, strict=True)
            if original.name in tensors
        }
        self._constant = self._constants()

    def run(self) -> Folded:
        specs: list[InputSpec] = []
        tensors: dict[str, torch.Tensor] = {}
        for placeholder, spec in self._specs.items():
            if placeholder not in self._constant:
                specs.append(spec)
                if placeholder in self._known:  # a buffer that the graph changes
                    tensors[spec.target] = self._known[placeholder]
        first = next(n for n in self._graph.nodes if n.op != "placeholder")
        held: dict[object, fx.Node] = {}
        reserved = {spec.target for spec in self._specs.values()}
        # All values come first: replacing a weight takes it away from those computed from it.
        found = [
            (node, self._key(node), self._value(node), self._weight_name(node))
            for node in self.frontier()
        ]
        for node, key, value, weight in found:
            if key not in held:
                name = _free_name(weight, _dtype_name(node, value), tensors, reserved)
                with self._graph.inserting_before(first):
                    held[key] = self._graph.placeholder(f"folded_{len(specs)}")
                held[key].meta = {"shape": tuple(value.shape), "dtype": value.dtype}
                specs.append(InputSpec(Source.BUFFER, name))
                tensors[name] = value
            node.replace_all_uses_with(held[key])
            if node not in self._specs:
                _returned_as_copy(held[key], first)
        self._graph.eliminate_dead_code()
        for placeholder in self._placeholders:
            if placeholder in self._constant:
                self._graph.erase_node(placeholder)
        self._graph.lint()
        module = fx.GraphModule(self._root, self._graph)
        # What the graph writes to its inputs goes by their places, which have moved.
        kept = [i for i, p in enumerate(self._placeholders) if p not in self._constant]
        written = tuple(kept.index(i) for i in self._signature.input_outputs)
        signature = replace(self._signature, inputs=tuple(specs), input_outputs=written)
        return Folded(module, signature, tensors)

    @staticmethod
    def _key(node: fx.Node) -> object:
        """Equal for two casts of one weight to one dtype, which are one tensor."""
        return (node.args[0], node.kwargs["dtype"]) if _is_cast(node) else node

    def _constants(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node.op == "placeholder":
                spec = self._specs[node]
                if spec.source is not Source.USER and not spec.mutated:
                    found.add(node)
            elif node.op == "call_function" and node.all_input_nodes:
                pure = node.target is operator.getitem or (
                    isinstance(node.target, torch._ops.OpOverload)
                    and torch.Tag.nondeterministic_seeded not in node.target.tags
                )
                if pure and all(n in found for n in node.all_input_nodes):
                    found.add(node)
        return found

    def frontier(self) -> dict[fx.Node, fx.Node]:
        """Constant nodes to store: those read by what is not constant, views looked through; and
        the first node that reads each."""
        frontier: dict[fx.Node, fx.Node] = {}

        def need(node: fx.Node, reader: fx.Node) -> None:
            if _is_view(node):
                for source in node.all_input_nodes:
                    need(source, reader)
            else:
                frontier.setdefault(node, reader)

        for node in self._graph.nodes:
            if node not in self._constant:
                for source in node.all_input_nodes:
                    if source in self._constant:
                        need(source, node)
        return frontier

    def _value(self, node: fx.Node) -> torch.Tensor:
        if node not in self._known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
            if self._wide:
                args, kwargs = widened((args, kwargs))
            kernel: Any = kernel_of(node) if self._fold_products else node.target
            with torch.no_grad():
                self._known[node] = kernel(*args, **kwargs)
        return self._known[node]

    def _weight_name(self, node: fx.Node) -> str:
        """The weight's own name where the value is that weight, cast or not."""
        source = node.args[0] if _is_cast(node) else node
        spec = self._specs.get(source) if isinstance(source, fx.Node) else None
        return spec.target if spec is not None else f"folded.{node.name}"


def _free_name(name: str, dtype: str, used: Collection[str], reserved: Collection[str]) -> str:
    """The name of a stored tensor that is made from the one called `name`: that, or one like it
    that nothing else has or could have."""
    if name not in used:
        return name
    numbers = (f"_{n}" for n in itertools.count(2))
    found = (f"{name}_{dtype}{number}" for number in itertools.chain([""], numbers))
    return next(each for each in found if each not in used and each not in reserved)


def _returned_as_copy(constant: fx.Node, first: fx.Node) -> None:
    """Let the caller get a copy of a stored result, or of a view of it: it was a new tensor at each
    call, to which the caller may write. `first` is the graph's first call."""
    if not reaches_output(constant) or any(u.target is aten.clone.default for u in constant.users):
        return
    with first.graph.inserting_before(first):
        copy = first.graph.call_function(aten.clone.default, (constant,))
    copy.meta = dict(constant.meta)
    constant.replace_all_uses_with(copy, lambda user: user is not copy)


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}


def _dtype_name(node: fx.Node, value: torch.Tensor) -> str:
    """The dtype that the graph gives the value, which is not its own when that is wide."""
    dtype = node.kwargs["dtype"] if _is_cast(node) else value.dtype
    assert isinstance(dtype, torch.dtype)
    return name_of(dtype)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if facts_of_target(node.target).is_a(Family.SHAPE):
        return True
    return schema is not None and any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )
