"""Buffers are written where they are, as eager writes them.

A trace is functional: BatchNorm in training gives the new statistics as results, which are copied
into the buffers after the call, and the buffers are copied before it, since autograd may have saved
what was read. Eager's `batch_norm` picks the kernel for the device (cuDNN's, MIOpen's), writes the
statistics in place, and refuses a batch that has one value a channel (its variance would be NaN);
`num_batches_tracked` is counted up in place. Here both are called as eager calls them.

A buffer is written in place only where its versions are a chain: the buffer is read by one operator
alone, what that makes of it by the next alone (a layer that is called twice), the last by the
output alone. So no reader finds another version than it would in the functional graph. These calls
stay where they are, and nothing may take them out, though nobody reads what they write.

Keeps: every bit on the CPU, where both are one kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.functional import batch_norm

from amp_convert.capture.graph_signature import InputSpec, Source

aten = torch.ops.aten
_TRACED = aten._native_batch_norm_legit_functional.default
_STATISTICS = (3, 4)
"""Running mean and variance: their places among the arguments, and the new ones' in the results."""

Chain = tuple[fx.Node, ...]


def write(
    graph: fx.Graph, placeholders: Mapping[fx.Node, InputSpec], buffer_outputs: Sequence[str]
) -> frozenset[int]:
    """Write what can be written in place; the numbers of the inputs that are."""
    numbers = {node: i for i, node in enumerate(placeholders)}
    buffers = {
        spec.target: node for node, spec in placeholders.items() if spec.source is Source.BUFFER
    }
    written = [buffers.get(name) for name in buffer_outputs]
    if None in written or len(set(written)) != len(written):
        return frozenset()  # one buffer under two names
    (output,) = graph.find_nodes(op="output")
    values: list[Any] = list(output.args[0])
    norms: dict[fx.Node, Chain] = {}
    counts: dict[fx.Node, Chain] = {}
    for buffer, value in zip(written, values, strict=False):
        assert buffer is not None
        if chain := _chain(buffer, value, values):
            kind = norms if chain[0].target is _TRACED else counts
            kind[buffer] = chain
    in_place = set(counts)
    for chain in counts.values():
        for node in chain:
            node.target = aten.add_.Tensor
    for buffer, chain in norms.items():
        pair = [chain[0].args[place] for place in _STATISTICS]  # both of a layer, or neither
        if all(isinstance(each, fx.Node) and norms.get(each) == chain for each in pair):
            in_place.add(buffer)
    _rewire(output, written, values, in_place)
    for chain in dict.fromkeys(norms[b] for b in norms if b in in_place):
        for node in chain:
            _call_as_eager(graph, node)
    return frozenset(numbers[buffer] for buffer in in_place)


def _chain(buffer: fx.Node, value: object, values: list[Any]) -> Chain:
    """The operators that make a buffer's new value, one from what the other made; none where they
    are not known, or where anything else reads a version."""
    chain: list[fx.Node] = []
    version = buffer
    while version is not value:
        readers = list(version.users)
        if len(readers) != 1:
            return ()
        after = _next(readers[0], version)
        if after is None or (chain and readers[0].target is not chain[0].target):
            return ()
        chain.append(readers[0])
        version = after
    last = [user for user in version.users if user.op != "output"]
    return () if last or values.count(value) != 1 else tuple(chain)


def _next(node: fx.Node, version: fx.Node) -> fx.Node | None:
    """The version of a buffer that an operator makes of this one."""
    if node.target is aten.add.Tensor:
        dtype = version.meta.get("dtype")
        counts = len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], int)
        whole = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
        same = node.args[0] is version and node.meta.get("dtype") is dtype
        return node if counts and whole and same else None
    if node.target is not _TRACED or node.args[5] is not True:
        return None
    places = [place for place in _STATISTICS if node.args[place] is version]
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    known = len(results) == len(node.users) and not results.keys() - {0, *_STATISTICS}
    if len(places) != 1 or not known or 0 not in results or not results[0].users:
        return None
    return results.get(places[0])


def _rewire(
    output: fx.Node,
    written: Sequence[fx.Node | None],
    values: list[Any],
    in_place: set[fx.Node],
) -> None:
    """Return the buffers themselves."""
    for i, buffer in enumerate(written):
        if buffer in in_place:
            values[i] = buffer
    output.args = (tuple(values),)


def _call_as_eager(graph: fx.Graph, node: fx.Node) -> None:
    tensor, weight, bias, *statistics, _, momentum, eps = node.args
    buffers = [_buffer(each) for each in statistics]
    with graph.inserting_before(node):
        arguments = (tensor, *buffers, weight, bias, True, momentum, eps)
        whole = graph.call_function(batch_norm, arguments)
    for reader in list(node.users):
        if reader.args[1] == 0:
            whole.meta = reader.meta
            reader.replace_all_uses_with(whole)
        else:
            reader.replace_all_uses_with(buffers[_STATISTICS.index(reader.args[1])])
        graph.erase_node(reader)
    graph.erase_node(node)


def _buffer(version: object) -> fx.Node:
    """The buffer that a version is of. Earlier calls are rewritten already."""
    assert isinstance(version, fx.Node)
    assert version.op == "placeholder"
    return version
