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
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.core import choices
from amp_convert.core.number_formats import is_float_tensor, unit_roundoff
from amp_convert.core.op_facts import HEAVY, Family, facts_of_target
from amp_convert.core.slices import LEAST, SliceKind, SliceSums
from amp_convert.core.tensor_errors import CHUNK, ErrorSums, larger
from amp_convert.profile.graph_roles import is_running, routes
from amp_convert.profile.growth import Growth
from amp_convert.profile.rerun import can_be_tried, evaluate, kept_inputs, repeatable
from amp_convert.profile.tiny_weights import TinyWeights

WINDOW = 32
"""How many nodes back, in graph order, a value is blamed for a later error."""
NOTABLE = 4.0
"""The growth from which on a value is searched for; no limit in a rules file is lower."""
_ANY = 1e-9
"""Of the share of changed choices."""

# Of a table that a rounded index leaves, or a matrix that is singular when it is rounded.
_REFUSALS = (RuntimeError, IndexError, ValueError)


class Trials:
    """The trials of one graph; `labels` names nodes as `Growth.reader` does, and `values` has what
    each gave when it was recorded (see `capture.captured.Trace`)."""

    def __init__(
        self,
        graph: fx.Graph,
        labels: Mapping[str, str],
        values: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self._nodes = list(graph.nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._labels, self._dtype = labels, dtype
        self._tiny = TinyWeights(dtype)
        self._routers = {node for node in self._nodes if routes(node, values)}

    def of(
        self, reader: fx.Node, env: Mapping[fx.Node, Any], result: Any
    ) -> Iterator[tuple[fx.Node, Growth]]:
        """What running `reader` on rounded values shows, of itself and of the nodes it blames.

        `env` holds the FP32 values of at least the last `WINDOW` nodes, `result` the reader's own.
        """
        if reader.op == "output":
            yield from self._of_outputs(reader, env)
        if not can_be_tried(reader):
            return
        if facts_of_target(reader.target).is_a(Family.SUM):
            yield reader, Growth(lost=self._lost(reader, env))
        if reader in self._routers:
            yield from self._of_choices(reader, env, result)
        kept, rounded = kept_inputs(reader), self._all_rounded(reader, env)
        inputs = self._growth(result, reader, rounded)
        yield reader, Growth(inputs=inputs, channel=self._channel(result, reader, rounded, env))
        if inputs < NOTABLE:
            return

        def measure(values: Mapping[fx.Node, Any]) -> float:
            return self._growth(result, reader, values)

        label = self._labels.get(reader.name, reader.name)
        for value, growth in self._search(reader, kept, env, measure, NOTABLE):
            yield value, Growth(result=growth, reader=label)

    def _channel(
        self,
        want: Any,
        reader: fx.Node,
        values: Mapping[fx.Node, Any],
        env: Mapping[fx.Node, Any],
    ) -> float | None:
        """The error of a product's worst channel where one of its weights is tiny (see
        `tiny_weights`)."""
        if not self._tiny.concern(reader, env):
            return None
        try:
            return self._tiny.channel(reader, want, evaluate(reader, values))
        except _REFUSALS as refusal:
            return _infinite(refusal)

    def _all_rounded(self, reader: fx.Node, env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """All that a node reads, rounded, but for what it reads in FP32 on some device."""
        kept = kept_inputs(reader)
        rounded = {n: self._rounded(env[n]) for n in reader.all_input_nodes if n not in kept}
        return {**env, **rounded}

    def _search(
        self,
        reader: fx.Node,
        known: Collection[fx.Node],
        env: Mapping[fx.Node, Any],
        measure: Callable[[Mapping[fx.Node, Any]], float],
        notable: float,
        *,
        past_products: bool = True,
    ) -> Iterator[tuple[fx.Node, float]]:
        """The values behind `reader`, from reader to producer, that matter to it when they alone
        are rounded: `measure` says how much, of values by node. Nothing is looked for behind what
        is harmless. Without `past_products` a heavy product is the last one, and all that it does
        in low precision is tried: what it reads is rounded, too."""
        between, pending, seen = self._before(reader), list(reader.all_input_nodes), set(known)
        while pending:
            value = pending.pop()
            if value in seen or value.op != "call_function":
                continue
            seen.add(value)
            ends = not past_products and facts_of_target(value.target).is_a(*HEAVY)
            result = evaluate(value, self._all_rounded(value, env)) if ends else env[value]
            effect = self._blame(value, self._rounded(result), between, env, measure)
            if effect < notable:
                continue
            yield value, effect
            if not ends:
                pending += value.all_input_nodes

    # --- outputs, choices, increments ------------------------------------------------------------

    def _of_outputs(
        self, node: fx.Node, env: Mapping[fx.Node, Any]
    ) -> Iterator[tuple[fx.Node, Growth]]:
        """The last operations before an output whose spread is a few roundings wide."""
        for output in dict.fromkeys(node.all_input_nodes):
            want = env[output]
            if not is_float_tensor(want) or want.numel() < LEAST:
                continue

            def measure(
                values: Mapping[fx.Node, Any], output: fx.Node = output, want: Any = want
            ) -> float:
                have = values[output]
                if have.shape != want.shape:
                    return math.inf
                sums = SliceSums()
                sums.add(want, have)
                kinds = (SliceKind.WHOLE, SliceKind.CHANNEL, SliceKind.FAINT_CHANNEL)
                errors = [s.error for s in sums.slices() if s.kind in kinds and s.error > 0]
                return max(errors, default=0.0) / unit_roundoff(self._dtype)

            if not measure({**env, output: self._rounded(want)}) < NOTABLE:
                found = self._search(node, (), env, measure, NOTABLE, past_products=False)
                for value, error in found:
                    yield value, Growth(output=error)

    def _of_choices(
        self, reader: fx.Node, env: Mapping[fx.Node, Any], result: Any
    ) -> Iterator[tuple[fx.Node, Growth]]:
        """What decides a choice that decides what is computed."""
        total = sum(index.numel() for index in choices.indices(result))

        def measure(values: Mapping[fx.Node, Any]) -> float:
            have = evaluate(reader, values)
            read = values[reader.all_input_nodes[0]]
            return choices.changed(reader, read, result, have) / max(total, 1)

        label = self._labels.get(reader.name, reader.name)
        own = measure(self._all_rounded(reader, env))
        if own:
            yield reader, Growth(choices=own, chooser=label)
        for value, share in self._search(reader, (), env, measure, _ANY, past_products=False):
            yield value, Growth(choices=share, chooser=label)

    def _lost(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> float:
        """The share of the increments that adding them to a running value in low precision leaves
        without any effect; 0 where a node does not add to one."""
        terms = [n for n in node.args[:2] if isinstance(n, fx.Node)]
        if len(terms) != 2 or not all(is_float_tensor(env[n]) for n in terms):
            return 0.0
        sizes = [float(torch.linalg.vector_norm(env[n], dtype=torch.float64)) for n in terms]
        running, small = terms if sizes[0] >= sizes[1] else terms[::-1]
        if not is_running(running, node):
            return 0.0
        held, step = self._rounded(env[running]), env[small]
        total = held - step if facts_of_target(node.target).name == "aten.sub" else held + step
        moves = (step != 0).expand_as(total)
        lost = (self._rounded(total) == held) & moves
        return float(lost.sum()) / max(float(moves.sum()), 1.0)

    # --- one rounded value -----------------------------------------------------------------------

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
        rounded: Any,
        between: list[fx.Node],
        env: Mapping[fx.Node, Any],
        measure: Callable[[Mapping[fx.Node, Any]], float],
    ) -> float:
        """What `measure` says when `value` alone is `rounded`, wherever it is read; 0 where the
        nodes between cannot run again."""
        if value not in between:
            return 0.0
        values: dict[fx.Node, Any] = {**env, value: rounded}
        changed = {value}
        for node in between[between.index(value) + 1 :]:
            if changed.isdisjoint(node.all_input_nodes):
                continue
            if not repeatable(node):
                return 0.0
            try:
                values[node] = evaluate(node, values)
            except _REFUSALS as refusal:
                return _infinite(refusal)
            changed.add(node)
        try:
            return measure(values)
        except _REFUSALS as refusal:
            return _infinite(refusal)

    def _rounded(self, value: Any) -> Any:
        def low(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype != torch.float32:
                return tensor
            return rounded_within(tensor.detach(), self._dtype)

        return pytree.tree_map_only(torch.Tensor, low, value)

    def _growth(self, reference: Any, reader: fx.Node, values: Mapping[fx.Node, Any]) -> float:
        """The largest relative L2 error of any result of `reader` on `values`, in units of the
        dtype's roundoff; infinite when it refuses them, as a factorisation may."""
        try:
            result = evaluate(reader, values)
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


def rounded_within(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An FP32 tensor of the same strides, rounded to a low dtype; what leaves its range stays."""
    rounded = torch.empty_like(tensor)
    if not rounded.is_contiguous():
        rounded.copy_(tensor.to(dtype))
        return torch.where(rounded.isinf(), tensor, rounded)
    # A weight may be as large as all the rest: a part at a time.
    flat = tensor.contiguous().reshape(-1)
    for part, into in zip(flat.split(CHUNK), rounded.reshape(-1).split(CHUNK), strict=True):
        into.copy_(part.to(dtype))
        torch.where(into.isinf(), part, into, out=into)
    return rounded


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
