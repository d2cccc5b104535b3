"""A captured graph + RangeStats -> the `Site` of each node, which is all that guards look at.

Neighbours are found along FP32 values. An operator that only moves values is looked through; a
value `reaches` a sine or an exponential through sums, products and quotients too, since
those pass a rounding error on.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from amp_convert.capture.captured import Value
from amp_convert.core.op_facts import Family, OpFacts, facts_of, facts_of_target
from amp_convert.plan.dtype_flow import tensor_arguments
from amp_convert.plan.guards.epsilon import eps_of
from amp_convert.plan.guards.site import Consumer, Operand, Site
from amp_convert.profile.calibrate import Range
from amp_convert.profile.growth import Growth


class Sites:
    """The sites of one graph. `ops` has the short name of every call, `range_of` what calibration
    saw of a value, `growth_of` what its
    trials did of a node, `weight_of` the name of a parameter, buffer or constant ("" for any other
    value); `masks` is whether masks are clamped, and so excused from the limits on large numbers.
    """

    def __init__(
        self,
        graph: fx.Graph,
        values: Mapping[str, Any],
        ops: Mapping[str, str],
        range_of: Callable[[fx.Node], Range | None],
        growth_of: Callable[[fx.Node], Growth | None],
        weight_of: Callable[[fx.Node], str],
        device: str,
        batches: int,
        *,
        masks: bool,
    ) -> None:
        self._values, self._ops = values, ops
        self._range_of, self._growth_of, self._weight_of = range_of, growth_of, weight_of
        self._device, self._batches = device, batches
        self._known: dict[fx.Node, Site] = {}
        self._feeds: dict[fx.Node, tuple[Consumer, ...]] = {}
        self._reaches: dict[fx.Node, tuple[Consumer, ...]] = {}
        self._masked: set[fx.Node] = set()
        self._masks = masks
        for node in reversed(graph.nodes):
            self._feeds[node] = tuple(dict.fromkeys(self._consumers(node, self._feeds)))
            self._reaches[node] = tuple(dict.fromkeys(self._ends(node)))
            if masks and self._is_masked(node):
                self._masked.add(node)

    def of(self, node: fx.Node) -> Site:
        """The site of a call."""
        if node not in self._known:
            self._known[node] = self._site(node)
        return self._known[node]

    def _site(self, node: fx.Node) -> Site:
        arguments = _named_arguments(node)
        dim = arguments.get("dim", ())
        value = self._values[node.name]
        return Site(
            op=self._ops[node.name],
            result=self._range_of(node),
            shape=value.shape if isinstance(value, Value) else (),
            operands=tuple(self._operands(node)),
            scalars=_numbers(arguments),
            axes=tuple(dim) if isinstance(dim, list | tuple) else (dim,) if dim is not None else (),
            feeds=self._feeds[node],
            reaches=self._reaches[node],
            batches=self._batches,
            masked=node in self._masked,
            growth=self._growth_of(node),
        )

    def _operands(self, node: fx.Node) -> Iterator[Operand]:
        facts = facts_of_target(node.target)
        # A table that is looked up first is stored low once the model is frozen.
        kept = frozenset() if facts.delivers_low else facts.kept_arguments(self._device)
        for name, producer in tensor_arguments(node, self._values):
            value = self._values[producer.name]
            if name not in kept and value.dtype == torch.float32:
                yield Operand(
                    argument=name,
                    range=self._range_of(producer),
                    shape=value.shape,
                    weight=self._weight_of(producer),
                    eps=self._eps(producer),
                    mask=self._is_mask(producer, node, name),
                )

    def _eps(self, node: fx.Node) -> float | None:
        """The smallest value that a constant leaves to a non-negative value, if one does."""
        op = self._ops.get(node.name, "")
        if not op or not node.all_input_nodes:
            return None
        arguments = _named_arguments(node)
        for name, value in arguments.items():
            if isinstance(value, fx.Node) and (number := self._constant(value)) is not None:
                arguments[name] = number
        eps = eps_of(op, _numbers(arguments))
        if eps is not None:
            return eps
        if facts_of(op).name == "aten.sqrt":
            below = self._eps(node.all_input_nodes[0])
            return math.sqrt(below) if below is not None and below > 0 else None
        return self._eps(node.all_input_nodes[0]) if self._is_transparent(node) else None

    def _constant(self, node: fx.Node) -> float | None:
        """The value of a parameter, buffer or constant of one positive element, if it is one."""
        while node.op == "call_function" and self._is_copy(node):
            node = node.all_input_nodes[0]
        value, seen = self._values.get(node.name), self._range_of(node)
        if not self._weight_of(node) or seen is None or not isinstance(value, Value):
            return None
        return seen.maximum if math.prod(value.shape) == 1 and seen.maximum > 0 else None

    def _is_copy(self, node: fx.Node) -> bool:
        moves = self._facts(node).is_a(Family.SHAPE, Family.COPY, Family.PART)
        return moves and len(node.all_input_nodes) == 1

    def _is_transparent(self, node: fx.Node) -> bool:
        return node.target is operator.getitem or self._facts(node).moves

    def _facts(self, node: fx.Node) -> OpFacts:
        return facts_of(self._ops.get(node.name, ""))

    def _readers(self, node: fx.Node) -> Iterator[tuple[fx.Node, Consumer]]:
        """Each reader of a value, as which argument it reads it."""
        for user in node.users:
            if user.op == "call_function":
                op = self._ops[user.name]
                read, result = self._range_of(node), self._range_of(user)
                if user.target is operator.getitem:
                    yield user, Consumer(op, "")
                    continue
                for name, source in tensor_arguments(user, self._values):
                    if source is node:
                        yield user, Consumer(op, name, read, result)

    def _consumers(
        self, node: fx.Node, found: Mapping[fx.Node, tuple[Consumer, ...]]
    ) -> Iterator[Consumer]:
        for user, consumer in self._readers(node):
            if self._is_transparent(user):
                yield from found[user]
            else:
                yield consumer

    def _is_mask(self, value: fx.Node, reader: fx.Node, argument: str) -> bool:
        seen = self._range_of(value)
        if not self._masks or (seen is not None and seen.masks_whole_rows):
            return False
        return self._passes_mask(reader, argument) or self._ends_mask(reader, argument)

    def _passes_mask(self, reader: fx.Node, argument: str) -> bool:
        """Whether what a node reads there goes on as a mask, to softmaxes alone."""
        selects = self._facts(reader).passes_masks or self._is_transparent(reader)
        return reader in self._masked and selects and argument not in ("mask", "condition")

    def _is_masked(self, node: fx.Node) -> bool:
        """Whether a value ends in softmaxes and nowhere else, through sums and selections alone."""
        readers = list(self._readers(node))
        seen = self._range_of(node)
        if seen is not None and seen.masks_whole_rows:
            return False
        return bool(readers) and all(
            self._ends_mask(user, consumer.argument) or self._passes_mask(user, consumer.argument)
            for user, consumer in readers
        )

    def _ends_mask(self, node: fx.Node, argument: str) -> bool:
        exponentiates = self._facts(node).exponentiates
        return (exponentiates and argument == "self") or argument == "attn_mask"

    def _ends(self, node: fx.Node) -> Iterator[Consumer]:
        for user, consumer in self._readers(node):
            facts = consumer.facts
            adds = facts.is_a(Family.SUM, Family.SIGN, Family.DROPOUT)
            if facts.exponentiates or facts.is_a(Family.PERIODIC):
                yield replace(consumer, summed=any(c.facts.sums for c in self._feeds[user]))
            elif self._is_transparent(user) or (adds and not _has_alpha(user)):
                yield from self._reaches[user]
            elif adds or facts.is_a(Family.PRODUCT):
                yield from (replace(end, scaled=True) for end in self._reaches[user])


def _has_alpha(node: fx.Node) -> bool:
    """Whether a sum multiplies one of its terms."""
    return bool(_named_arguments(node).get("alpha", 1) != 1)


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names in its operator's schema."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _numbers(arguments: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in arguments.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
