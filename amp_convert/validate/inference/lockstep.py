"""The FP32 graph and its mixed-precision rewrite, run side by side, node by node.

At each node three results meet: the reference (the FP32 operator on FP32 values), the accumulated
one (the mixed operator on the mixed graph's own values) and the local one (the mixed operator on
the reference's values, cast as planned). A value is dropped after its last reader in its own graph,
so memory stays near that of two forward passes. Operators that draw random numbers draw the same
ones in all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import CHOICE, UNTAKEN
from amp_convert.capture.graph_signature import Source
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.rewrite.graph_execution import GraphExecution, execute
from amp_convert.rewrite.insert_casts import Rewritten, held, planned_numbers


@dataclass(frozen=True)
class NodeValues:
    """One node's results; `local` is None where the mixed node is the FP32 node. `ranked` is what
    a node that ranks reads in FP32, None for any other. `again` calls the FP32 operator once more,
    on what its argument, a function of (source, value), makes of each value that the node reads;
    it is None for a node that draws random numbers or is none of PyTorch's operators."""

    node: fx.Node
    reference: Any
    accumulated: Any
    local: Any
    ranked: Any = None
    again: Callable[[Callable[[fx.Node, Any], Any]], Any] | None = None


def run(
    rewritten: Rewritten,
    reference_inputs: Sequence[Any],
    mixed_inputs: Sequence[Any],
    visit: Callable[[NodeValues], None],
    wants_local: Callable[[fx.Node], bool],
    device: torch.device,
    *,
    differentiable: bool = False,
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Run both graphs on their flat inputs, calling `visit` after each node of the FP32 graph, but
    for those in a branch that one of the two does not take.

    Returns the flat outputs of both. `wants_local` says for which nodes to compute a local result.
    Where the reference is to be `differentiable`, its operators run with gradients on, on values of
    their own, so that `visit` may ask for the gradient of any of them.
    """
    lockstep = _Lockstep(rewritten, visit, wants_local, device, differentiable=differentiable)
    return lockstep.run(reference_inputs, mixed_inputs)


def _marker(value: Any) -> Any:
    """The value where it is none but stands for one: tensors cannot be looked for."""
    return value if value is UNTAKEN else None


class _Lockstep:
    def __init__(
        self,
        rewritten: Rewritten,
        visit: Callable[[NodeValues], None],
        wants_local: Callable[[fx.Node], bool],
        device: torch.device,
        *,
        differentiable: bool,
    ) -> None:
        self._rewritten, self._visit, self._device = rewritten, visit, device
        self._differentiable = differentiable
        self._wants_local = wants_local
        self._reference_graph = rewritten.captured.graph_module.graph
        given = rewritten.captured.signature.placeholders(self._reference_graph)
        self._weights = {n for n, spec in given.items() if spec.source is not Source.USER}

    def run(
        self, reference_inputs: Sequence[Any], mixed_inputs: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        if self._differentiable:
            reference_inputs = _detached(reference_inputs)
        reference = GraphExecution(self._rewritten.captured.graph_module, reference_inputs)
        mixed = GraphExecution(self._rewritten.graph_module, mixed_inputs)
        pending = iter(self._rewritten.graph_module.graph.nodes)
        for node in self._reference_graph.nodes:
            state = rng_state(self._device) if _is_random(node) else None
            with torch.set_grad_enabled(self._differentiable):
                reference.execute(node)
                if self._differentiable:
                    reference.values[node] = _apart(node, reference)
            self._rewind(state)
            holder = self._advance(mixed, pending, node)
            both = (reference.values[node], mixed.values[holder])
            if node.op == "call_function" and UNTAKEN not in map(_marker, both):
                local = None
                if self._wants_local(node) and CHOICE not in node.meta:
                    self._rewind(state)
                    local = self._local(node, reference, mixed)
                ranks = facts_of_target(node.target).is_a(Family.RANKING)
                read = reference.values[node.all_input_nodes[0]] if ranks else None
                again = None
                if state is None and isinstance(node.target, torch._ops.OpOverload):
                    again = partial(self._again, node, reference)
                self._visit(
                    NodeValues(
                        node, reference.values[node], mixed.values[holder], local, read, again
                    )
                )
            if node.op != "output":
                reference.free()
                mixed.free()
        return reference.values[node], mixed.values[holder]

    @staticmethod
    def _again(
        node: fx.Node, reference: GraphExecution, replaced: Callable[[fx.Node, Any], Any]
    ) -> Any:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: replaced(source, reference.values[source])
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _rewind(self, state: Any) -> None:
        if state is not None:
            set_rng_state(self._device, state)

    def _advance(self, mixed: GraphExecution, pending: Iterator[fx.Node], node: fx.Node) -> fx.Node:
        """Execute the mixed graph up to the node that holds the value of `node`."""
        holder = self._rewritten.values.get(node.name)
        candidate = node
        for candidate in pending:
            execute(mixed, candidate, self._rewritten)
            if candidate is holder:
                break
        return candidate

    def _local(self, node: fx.Node, reference: GraphExecution, mixed: GraphExecution) -> Any:
        """The mixed operator on the reference's values, cast to the dtypes that it gets in the mix.

        A weight's cast copy is the mixed arm's own: it is the same tensor.
        """
        holder = self._rewritten.values[node.name]
        decisions = self._rewritten.decisions
        decision, planned = decisions[node.name], iter(decisions[node.name].inputs)
        delivered_low = holder.target is not node.target
        call = holder.all_input_nodes[0] if delivered_low else holder

        def stand_in(source: fx.Node, twin: Any) -> Any:
            value = reference.values[source]
            if not isinstance(value, torch.Tensor):
                return value
            scale = next(planned).scale
            if source in self._weights:
                return twin
            if source.name in decisions:
                scale *= decisions[source.name].scale
            if is_float_tensor(value) and is_float_tensor(twin) and value.dtype != twin.dtype:
                return held(value, replace(decision, scale=scale)).to(twin.dtype)
            return value if scale == 1 else value * scale

        twins = [mixed.values[n] for n in _leaves(call)]
        made = iter([stand_in(s, t) for s, t in zip(_leaves(node), twins, strict=True)])
        assert next(planned, None) is None, decision.node
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(made))
        args, kwargs = planned_numbers((args, kwargs), decision)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result.to(holder.kwargs["dtype"]) if delivered_low else result


def _detached(inputs: Sequence[Any]) -> list[Any]:
    """The same values in tensors that nobody else holds, but for those that come with a history."""
    return [
        value.detach() if isinstance(value, torch.Tensor) and not value.requires_grad else value
        for value in inputs
    ]


def _apart(node: fx.Node, running: GraphExecution) -> Any:
    """The value of a node that was just executed. An operator may hand on the very tensor that it
    read, whose gradient would be that of all its readers; and what the model detaches still
    carries errors on."""
    value = running.values[node]
    if node.op == "output":
        return value
    sources = [running.values[source] for source in node.all_input_nodes]
    if node.target in _DETACHING:
        return sources[0].view_as(sources[0])
    read = {id(leaf) for leaf in pytree.tree_leaves(sources)}

    def own(value: Any) -> Any:
        return value.view_as(value) if id(value) in read else value

    return pytree.tree_map_only(torch.Tensor, own, value)


_DETACHING = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)


def _leaves(node: fx.Node) -> list[fx.Node]:
    return [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )
