"""How far does rounding a value throw off what reads it? Measured while calibration runs in FP32.

Ranges do not show that an offset is taken off, or that most of a result comes from tiny terms. So
each operator runs a second time on what it reads rounded to the low dtype and back to FP32, and the
relative L2 error of its result, in units of the dtype's roundoff, is its *growth*: about 0.5 for an
ordinary product or sum, hundreds where the digits cancel.

Where the growth is notable, the values behind it are rounded one at a time, and the graph between
such a value and the reader runs again. So values that are harmless because their error cancels
(the x in E[x²] - E[x]²) are told apart from those that are not (both means). The search goes
back from reader to producer until a value is harmless, or lies more than `WINDOW` nodes back: that
many activations are kept.

What lies beyond the dtype's range is not rounded: ranges answer for it, and masks are clamped.
Custom operators, those that write to their inputs and those that draw random numbers are not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.core.number_formats import is_float_tensor, unit_roundoff
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.core.tensor_errors import ErrorSums, larger

WINDOW = 32
"""How many nodes back, in graph order, a value is blamed for a later error."""
NOTABLE = 4.0
"""The growth from which on a value is searched for; no limit in a rules file is lower."""


# Of a table that a rounded index leaves, or a matrix that is singular when it is rounded.
_REFUSALS = (RuntimeError, IndexError, ValueError)


@dataclass(frozen=True)
class Growth:
    """How rounding errors grow around one node, in units of the low dtype's roundoff.

    `inputs` is the relative L2 error of the node's result when everything that it reads is rounded;
    `result` that of a later node, the `reader`, when this node's result is. Both are 0 where
    nothing was tried, and below `NOTABLE` only `inputs` is measured.
    """

    inputs: float = 0.0
    result: float = 0.0
    reader: str = ""

    def merged(self, other: Growth) -> Growth:
        """The larger of both; NaN is larger than anything."""
        worst = max(self, other, key=lambda growth: (math.isnan(growth.result), growth.result))
        return Growth(larger(self.inputs, other.inputs), worst.result, worst.reader)


class Trials:
    """The trials of one graph; `labels` names nodes as `Growth.reader` does."""

    def __init__(self, graph: fx.Graph, labels: Mapping[str, str], dtype: torch.dtype) -> None:
        self._nodes = list(graph.nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._labels, self._dtype = labels, dtype

    def of(
        self, reader: fx.Node, env: Mapping[fx.Node, Any], result: Any
    ) -> Iterator[tuple[fx.Node, Growth]]:
        """What running `reader` on rounded values shows, of itself and of the nodes it blames.

        `env` holds the FP32 values of at least the last `WINDOW` nodes, `result` the reader's own.
        """
        if not _can_be_tried(reader):
            return
        kept = _kept_inputs(reader)
        rounded = {n: self._rounded(env[n]) for n in reader.all_input_nodes if n not in kept}
        inputs = self._growth(result, reader, {**env, **rounded})
        yield reader, Growth(inputs=inputs)
        if inputs < NOTABLE:
            return
        label, between = self._labels.get(reader.name, reader.name), self._before(reader)
        pending, known = list(reader.all_input_nodes), set(kept)
        while pending:
            value = pending.pop()
            if value in known or value.op != "call_function":
                continue
            known.add(value)
            growth = self._blame(value, reader, between, env, result)
            if not growth < NOTABLE:
                yield value, Growth(result=growth, reader=label)
                pending += value.all_input_nodes

    def _before(self, reader: fx.Node) -> list[fx.Node]:
        """What the reader depends on, of the nodes in the window before it, in order."""
        last = self._index[reader]
        found, needed = [], set(reader.all_input_nodes)
        for node in reversed(self._nodes[max(last - WINDOW, 0) : last]):
            if node in needed:
                found.append(node)
                needed.update(node.all_input_nodes)
        return found[::-1]

    def _blame(
        self,
        value: fx.Node,
        reader: fx.Node,
        between: list[fx.Node],
        env: Mapping[fx.Node, Any],
        result: Any,
    ) -> float:
        """The growth at the reader when `value` alone is rounded, wherever it is read; 0 where the
        nodes between cannot run again."""
        if value not in between:
            return 0.0
        values: dict[fx.Node, Any] = {**env, value: self._rounded(env[value])}
        changed = {value}
        for node in between[between.index(value) + 1 :]:
            if changed.isdisjoint(node.all_input_nodes):
                continue
            if not _repeatable(node):
                return 0.0
            try:
                values[node] = _evaluate(node, values)
            except _REFUSALS as refusal:
                return _infinite(refusal)
            changed.add(node)
        return self._growth(result, reader, values)

    def _rounded(self, value: Any) -> Any:
        def low(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype != torch.float32:
                return tensor
            rounded = tensor.detach().to(self._dtype).to(torch.float32)
            return torch.where(rounded.isinf(), tensor, rounded)

        return pytree.tree_map_only(torch.Tensor, low, value)

    def _growth(self, reference: Any, reader: fx.Node, values: Mapping[fx.Node, Any]) -> float:
        """The largest relative L2 error of any result of `reader` on `values`, in units of the
        dtype's roundoff; infinite when it refuses them, as a factorisation may."""
        try:
            result = _evaluate(reader, values)
        except _REFUSALS as refusal:
            return _infinite(refusal)
        error = 0.0
        pairs = zip(pytree.tree_leaves(reference), pytree.tree_leaves(result), strict=True)
        for want, have in pairs:
            if is_float_tensor(want) and want.shape == have.shape:
                sums = ErrorSums()
                sums.add(want, have)
                error = larger(error, sums.rel_l2)
        return error / unit_roundoff(self._dtype)


def _infinite(refusal: Exception) -> float:
    """The growth where an operator refuses rounded values."""
    if isinstance(refusal, torch.OutOfMemoryError):
        raise refusal
    return math.inf


def keep_window(graph: fx.Graph, uses: Mapping[fx.Node, list[fx.Node]]) -> dict[Any, list[fx.Node]]:
    """`fx.Interpreter.user_to_last_uses`, with every value freed `WINDOW` nodes later."""
    nodes = list(graph.nodes)
    late: dict[fx.Node, list[fx.Node]] = {}
    for index, node in enumerate(nodes):
        late.setdefault(nodes[min(index + WINDOW, len(nodes) - 1)], []).extend(uses.get(node, ()))
    return late


def _can_be_tried(node: fx.Node) -> bool:
    """Whether a node computes new values: it is no view, and picks nothing from a tuple."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _repeatable(node):
        return False
    return all(returned.alias_info is None for returned in node.target._schema.returns)


def _repeatable(node: fx.Node) -> bool:
    """Whether running a node once more changes nothing, and gives the same result. Nobody knows
    that of a custom operator; memory that is not written yet holds something else each time."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") == "_operator"
    if node.target.namespace != "aten" or node.target._schema.is_mutable:
        return False
    if facts_of_target(node.target).is_a(Family.UNWRITTEN):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return True
    arguments = _arguments(node)
    return arguments.get("train") is False or arguments.get("dropout_p") == 0


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their names in its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    names = [a.name for a in schema.arguments]
    return {**found, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _kept_inputs(node: fx.Node) -> set[fx.Node]:
    """The inputs that a low node reads in FP32 on some device."""
    kept = facts_of_target(node.target).kept_arguments("cpu")
    given = {n: a for n, a in _arguments(node).items() if n in kept}
    return {leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Node)}


def _evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]
