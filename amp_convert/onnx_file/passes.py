"""What is tidied in an exported ONNX graph. Nothing that it computes from its inputs changes.

PyTorch's exporter translates one operator at a time, so it leaves casts behind that a reader of the
whole graph can see are not needed. `tidy` goes on until none of these finds anything:

1. `Identity` is removed; its input stands in for it. So is a `Slice` that takes everything.
2. So is a cast to the dtype that a value has already.
3. A cast to a wider dtype and back gives the value itself. The other way round, from FP32 to FP16
   and back, is a rounding that somebody asked for, and stays.
4. A value is cast to a dtype once, for all its readers, and a size is computed once.
5. What nothing reads is removed.

Constants are folded before that: sizes, scalars, and weights that are only moved (transposed,
sliced, joined) on the way to what reads them. A weight that something else reads as well stays as
it is, and equal constants become one, so none is stored twice. Nothing is fused: a batch
normalisation folded into its convolution would mix two precisions.

Of onnx-ir's passes (1.1.0), `IdentityEliminationPass` and `CommonSubexpressionEliminationPass` are
not used: they drop the labels that say which node of the model a value is, and the second merges
layers of equal weights. `DeduplicateHashedInitializersPass` raises ValueError on a weight that is
not contiguous, and `DeduplicateInitializersPass` holds the bytes of all weights at once.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_MADE_OF = "pkg.onnxscript.optimizer.folded_from"

_SMALL = 1024
"""Elements of a constant that is folded whatever is computed from it."""

_MOVES = {
    "Cast", "Concat", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip

_RECKONS = {
    "Add", "Concat", "Gather", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze",
}  # fmt: skip
_LAST = 2**63 - 1
"""The end of a slice that goes on to the end."""

_HOLDERS = {"FLOAT16": {"FLOAT", "DOUBLE"}, "BFLOAT16": {"FLOAT", "DOUBLE"}, "FLOAT": {"DOUBLE"}}
"""For each dtype, by its name in `ir.DataType`, those that hold all of its numbers."""


def add_tag(value: ir.Value, key: str, tag: str) -> None:
    """Add words to those that a value's metadata has under `key`."""
    words = (*value.metadata_props.get(key, "").split(), *tag.split())
    value.metadata_props[key] = " ".join(dict.fromkeys(words))


def fold_constants(model: ir.Model) -> None:
    """Inline functions, and compute what depends on constants alone."""
    import onnx_ir.passes.common as common

    common.InlinePass()(model)
    weights = {name for name, value in model.graph.initializers.items() if _elements(value) > 1}
    _fold(model, set())
    # Only now is it known from where to where a weight is sliced.
    if moves := _moves_of_weights(model.graph):
        _fold(model, moves)
    for value in list(model.graph.initializers.values()):
        made_of = weights.intersection(ast.literal_eval(value.metadata_props.get(_MADE_OF, "[]")))
        name = f"{'_'.join(made_of)}_moved"
        if len(made_of) == 1 and value.name not in weights and name not in model.graph.initializers:
            value.name = name


def _fold(model: ir.Model, moves: set[ir.Node]) -> None:
    """Fold what is small, and `moves` whatever their size."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer._constant_folding import FoldConstantsPass

    largest = max((_elements(v) for v in model.graph.initializers.values()), default=0)
    FoldConstantsPass(
        shape_inference=True,
        input_size_limit=_SMALL,
        output_size_limit=max(_SMALL, largest),
        should_fold=lambda node: True if node in moves else None,
    )(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _moves_of_weights(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that only move constants, if nothing but such nodes reads those that are large."""
    moves: set[ir.Node] = set()

    def stays(value: ir.Value) -> bool:
        if not value.is_initializer():
            return value.producer() not in moves
        return _elements(value) > _SMALL and not moves.issuperset(value.consumers())

    for node in graph:
        constant = (v.is_initializer() or v.producer() in moves for v in _inputs(node))
        if node.op_type in _MOVES and all(constant):
            moves.add(node)
    while kept := {node for node in moves if any(map(stays, _inputs(node)))}:
        moves -= kept
    return moves


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _elements(value: ir.Value) -> int:
    return int(value.const_value.size) if value.const_value is not None else 0


def tidy(model: ir.Model, tag: str) -> None:
    """The passes of this module's docstring. A value that stands in for another takes over what
    that has in its metadata under `tag`."""
    import onnx_ir.passes.common as common

    _type_results(model)
    _share_constants(model.graph)
    changed = True
    while changed:
        changed = False
        seen: dict[object, ir.Node] = {}  # in order, so the first comes before the others' readers
        sizes: set[ir.Value] = set()
        for node in list(model.graph):
            value = node.outputs[0]
            stand_in = _replacement(node)
            if stand_in is None and (_is_cast(node) or _computes_a_size(node, sizes)):
                first = seen.setdefault(_key(node), node)
                stand_in = first.outputs[0] if first is not node else None
            if stand_in is not None and _is_read(value):
                add_tag(stand_in, tag, value.metadata_props.get(tag, ""))
                value.replace_all_uses_with(stand_in, replace_graph_outputs=True)
                changed = True
        common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _type_results(model: ir.Model) -> None:
    """Give the results of loops, branches and sequences their types, which the exporter may leave
    out: those of what a loop carries on, of what the subgraph gives, of what a sequence holds."""
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        types: list[ir.TypeProtocol | None] = []
        if node.op_type == "Loop":
            carried, made = node.inputs[2:], node.attributes["body"].as_graph().outputs[1:]
            found = (*carried, *made[len(carried) :])
            types = [value.type if value is not None else None for value in found]
        elif node.op_type == "If":
            types = [value.type for value in node.attributes["then_branch"].as_graph().outputs]
        elif node.op_type in ("ConcatFromSequence", "SequenceAt"):
            sequence = node.inputs[0] and node.inputs[0].type
            types = [sequence.elem_type if isinstance(sequence, ir.SequenceType) else None]
        for value, type_ in zip(node.outputs, types, strict=bool(types)):
            value.type = value.type or type_


def _replacement(node: ir.Node) -> ir.Value | None:
    """The value ahead of a node that is the same as its result, if it is there."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type == "Identity" or _takes_everything(node):
        return source
    if not _is_cast(node):
        return None
    if source.dtype == _target(node):
        return source
    before = source.producer()
    if before is not None and _is_cast(before):
        original = before.inputs[0]
        assert original is not None
        holders = _HOLDERS.get(_target(node).name, ())
        if original.dtype == _target(node) and _target(before).name in holders:
            return original
    return None


def _takes_everything(node: ir.Node) -> bool:
    """Whether a node is a `Slice` from the first element to the last."""
    if node.op_type != "Slice" or node.domain:
        return False
    given = [_numbers(value) for value in node.inputs[1:]]
    starts, ends, steps = given[0], given[1], given[3] if len(given) > 3 else [1]
    if starts is None or ends is None or steps is None:
        return False
    return not any(starts) and all(end >= _LAST for end in ends) and set(steps) == {1}


def _computes_a_size(node: ir.Node, sizes: set[ir.Value]) -> bool:
    """Whether a node reckons with nothing but sizes of tensors, `sizes`, and constants; its results
    become some of those."""
    if node.domain or node.op_type not in _RECKONS:
        return False
    given = [value for value in _inputs(node) if value.const_value is None]
    found = node.op_type == "Shape" or (bool(given) and sizes.issuperset(given))
    sizes.update(node.outputs if found else ())
    return found


def _key(node: ir.Node) -> object:
    """Equal for nodes that compute the same."""
    attributes = sorted((name, str(a.value)) for name, a in node.attributes.items())
    return node.domain, node.op_type, tuple(node.inputs), tuple(attributes), len(node.outputs)


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant of integers; None of what is not constant."""
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and not node.domain


def _target(cast: ir.Node) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType(cast.attributes["to"].as_int())


def _share_constants(graph: ir.Graph) -> None:
    """Make one of constants with the same bytes."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        key = (tensor.dtype, tuple(tensor.shape), sha256(tensor.tobytes()).digest())
        if kept.setdefault(key, value) is not value:
            value.replace_all_uses_with(kept[key], replace_graph_outputs=True)
            del graph.initializers[name]


def name_borders(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the graph's inputs and outputs, in order; whatever else has such a name gives way.

    What goes straight from an input or a weight to an output, or to two outputs, passes through an
    `Identity`, as ONNX demands.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    graph = model.graph
    for index, value in enumerate(graph.outputs):
        if value.is_initializer():
            identity = ir.node("Identity", [value])
            identity.outputs[0].type, identity.outputs[0].shape = value.type, value.shape
            graph.append(identity)
            graph.outputs[index] = identity.outputs[0]
    common.OutputFixPass()(model)
    for node in graph:
        if node.op_type == "Identity":  # a second name for a value, not another value
            node.outputs[0].metadata_props.clear()
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    common.NameFixPass()(model)
