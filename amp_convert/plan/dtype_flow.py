"""Dtypes through a graph: given each node's precision, what is cast and what comes out.

Walks the graph once, in order. At each node it knows the dtypes that arrive, decides by the node's
`Precision` which of them are cast, and asks the operator itself (on fake tensors of the recorded
shapes, so nothing is computed) which dtypes leave. Only FP32 and low values are ever cast.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Value
from amp_convert.core.errors import first_line
from amp_convert.core.op_facts import Family, facts_of_target
from amp_convert.core.precision import Precision, wanted_dtype


@dataclass(frozen=True)
class Flow:
    """One node's casts. `inputs` has an entry a tensor argument: the dtype to cast it to, or None;
    `computes` the dtypes that the operator then gets.

    `output` is the dtype to cast the result to, or None; `result` the dtypes that consumers see, in
    the structure of the node's value.
    """

    inputs: tuple[torch.dtype | None, ...]
    computes: tuple[torch.dtype, ...]
    output: torch.dtype | None
    result: Any


class NoKernelError(Exception):
    """An operator refuses the dtypes that its precision would give it: the node's name, and what
    the operator said."""

    def __init__(self, node: str, cause: Exception) -> None:
        self.node = node
        self.cause = first_line(cause)
        super().__init__(f"{node}: {self.cause}")


def tensor_arguments(node: fx.Node, values: Mapping[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    """(schema argument name, producer) of each tensor argument, in the order of `Flow.inputs`."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else [""] * len(node.args)
    pairs = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    for name, argument in pairs:
        for leaf in pytree.tree_leaves(argument):
            if isinstance(leaf, fx.Node) and isinstance(values.get(leaf.name), Value):
                yield name, leaf


def propagate(
    graph: fx.Graph,
    values: Mapping[str, Any],
    precision: Mapping[str, Precision],
    low: torch.dtype,
    device: str,
) -> dict[str, Flow]:
    """The `Flow` of every call in `graph`, by FX name.

    `values` are the recorded values of the FP32 run, `precision` has the nodes that are decided
    about (the others get ORIGINAL). Raises NoKernelError when an operator refuses.
    """
    walk = _Walk(values, low, device)
    return {
        node.name: walk.visit(node, precision.get(node.name, Precision.ORIGINAL))
        for node in graph.nodes
        if node.op == "call_function"
    }


def is_cast_to_fp32(node: fx.Node) -> bool:
    """Whether a node is a cast that names float32, as each does that a trace of an FP32 model has
    for one to the dtype that the model works in."""
    named = pytree.tree_leaves((node.args, node.kwargs))
    return facts_of_target(node.target).is_a(Family.CAST) and torch.float32 in [
        leaf for leaf in named if isinstance(leaf, torch.dtype)
    ]


class _Walk:
    def __init__(self, values: Mapping[str, Any], low: torch.dtype, device: str) -> None:
        self._values, self._low, self._device = values, low, device
        self._dtypes: dict[str, Any] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}

    def visit(self, node: fx.Node, precision: Precision) -> Flow:
        arguments = list(tensor_arguments(node, self._values))
        arriving = [self._dtype(producer) for _, producer in arguments]
        wanted = list(self._wanted(node, precision, arguments, arriving))
        inputs = tuple(
            want if want != have else None for want, have in zip(wanted, arriving, strict=True)
        )
        if precision is Precision.LOW and is_cast_to_fp32(node):
            result: Any = self._low  # the word of its code is "the working dtype"
        else:
            result = self._result(node, arguments, wanted)
        output = None
        if precision is Precision.LOW and facts_of_target(node.target).delivers_low:
            output, result = self._low, self._low
        self._dtypes[node.name] = result
        return Flow(inputs, tuple(wanted), output, result)

    def _dtype(self, node: fx.Node) -> torch.dtype:
        return self._dtypes.get(node.name, self._values[node.name].dtype)  # type: ignore[no-any-return]

    def _wanted(
        self,
        node: fx.Node,
        precision: Precision,
        arguments: list[tuple[str, fx.Node]],
        arriving: list[torch.dtype],
    ) -> Iterator[torch.dtype]:
        kept = facts_of_target(node.target).kept_arguments(self._device)
        for (name, producer), have in zip(arguments, arriving, strict=True):
            yield wanted_dtype(
                precision,
                have,
                original=self._values[producer.name].dtype,
                low=self._low,
                kept=name in kept,
                meets_fp32=torch.float32 in arriving,
            )

    def _result(
        self, node: fx.Node, arguments: list[tuple[str, fx.Node]], dtypes: list[torch.dtype]
    ) -> Any:
        originals = [self._values[producer.name].dtype for _, producer in arguments]
        if node.target is operator.getitem:
            return _dtype_tree(self._dtypes[node.args[0].name])[node.args[1]]  # type: ignore[union-attr,index]
        if dtypes == originals:
            return _dtype_tree(self._values[node.name])
        if not isinstance(node.target, torch._ops.OpOverload):
            return _dtype_tree(self._values[node.name])
        # A tensor without dimensions gives way to one with, whatever their dtypes.
        ranked = tuple(bool(self._values[producer.name].shape) for _, producer in arguments)
        constants = pytree.tree_map_only(fx.Node, lambda _: None, (node.args, node.kwargs))
        known = self._values[node.name]
        results = (
            len(known) if isinstance(known, list | tuple) else 0
        )  # of a split, it depends on sizes
        key = (node.target, tuple(dtypes), ranked, repr(constants), results)
        if key not in self._known:
            self._known[key] = self._ask(node, dtypes)
        result, original = self._known[key], _dtype_tree(self._values[node.name])
        if facts_of_target(node.target).has_fp32_statistics and isinstance(original, tuple):
            # Fake kernels call the saved statistics low; the real ones keep them in FP32.
            return (result[0], *original[1:])
        if isinstance(original, tuple) and isinstance(result, tuple):
            # What was not asked for is None, where a fake kernel has a tensor for everything.
            return tuple(
                r if o is not None else None for r, o in zip(result, original, strict=True)
            )
        return result

    def _ask(self, node: fx.Node, given: list[torch.dtype]) -> Any:
        dtypes = iter(given)

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            value = self._values.get(leaf.name)
            if not isinstance(value, Value):
                return value
            return torch.empty_strided(
                value.shape, value.stride, dtype=next(dtypes), device=value.device
            )

        try:
            with self._fake, torch.no_grad(), _unlogged():
                args, kwargs = pytree.tree_map(stand_in, (node.args, node.kwargs))
                return pytree.tree_map(_leaf_dtype, node.target(*args, **kwargs))  # type: ignore[operator]
        except (DynamicOutputShapeException, DataDependentOutputException):
            # The values decide about the shape; the dtype is that of what is selected.
            floats = [d for d in given if d.is_floating_point]
            dtype = functools.reduce(torch.promote_types, floats)
            original = _dtype_tree(self._values[node.name])
            return pytree.tree_map(
                lambda d: dtype if d is not None and d.is_floating_point else d, original
            )
        except Exception as error:  # whatever the operator raises, it does not take these dtypes
            raise NoKernelError(node.name, error) from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """A refusal is an answer here; PyTorch would log it as a failure."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _leaf_dtype(leaf: Any) -> torch.dtype | None:
    return leaf.dtype if isinstance(leaf, torch.Tensor) else None


def _dtype_tree(value: Any) -> Any:
    return pytree.tree_map_only(Value, lambda v: v.dtype, value)
