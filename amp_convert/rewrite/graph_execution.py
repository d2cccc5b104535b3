"""Running a graph a node at a time, so that whoever runs it sees each value and can free it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import Choices
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.errors import UnsupportedModelError, first_line
from amp_convert.core.number_formats import LOW_DTYPES, widened
from amp_convert.rewrite.insert_casts import Rewritten


class KernelError(UnsupportedModelError):
    """An operator refuses the dtypes that the plan gives it. `info` is the node, if it is known."""

    def __init__(self, info: NodeInfo | None, cause: Exception) -> None:
        self.info = info
        self.cause = first_line(cause)
        op = info.short_op if info else "a cast"
        super().__init__(
            f"{op} refuses the dtypes that the plan gives it: {self.cause}",
            where=" ".join(filter(None, (info.layer, info.location))) if info else "",
            mend=f'Keep it in FP32 by a rule: op = "{op}", category = "deny".',
        )


class GraphExecution:
    """One graph being executed, a node at a time; keeps only values that still have a reader. Those
    in a branch that is not taken are `UNTAKEN`."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._module = graph_module
        self.values: dict[fx.Node, Any] = {}
        self._readers = Counter({n: len(n.users) for n in graph_module.graph.nodes})
        self._spent: list[fx.Node] = []
        self._inputs = iter(inputs)
        self._choices = Choices(graph_module.graph)

    def execute(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = next(self._inputs)
        elif node.op == "get_attr":
            self.values[node] = operator.attrgetter(str(node.target))(self._module)
        elif node.op == "call_function":
            value = self._choices.instead(node, self.values)
            if value is None:
                args, kwargs = self.arguments(node)
                value = node.target(*args, **kwargs)  # type: ignore[operator]
            self.values[node] = value
        else:
            self.values[node] = self.arguments(node)[0][0]
        self._spent.append(node)

    def execute_in_fp32(self, node: fx.Node) -> None:
        """Execute a call that refuses low values on FP32 ones; its results are in the dtype that
        the graph gives them."""

        def wide(value: Any) -> Any:
            return value.float() if _is_low(value) else value

        low = node.meta.get("dtype")
        arguments = pytree.tree_map(wide, self.arguments(node))
        args, kwargs = widened(arguments)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if low is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.to(low)
        self.values[node] = value
        self._spent.append(node)

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        return fx.map_arg((node.args, node.kwargs), self.values.__getitem__)

    def free(self) -> None:
        """Drop what the nodes executed since the last call have read for the last time."""
        for node in self._spent:
            for source in node.all_input_nodes:
                self._readers[source] -= 1
                if not self._readers[source]:
                    del self.values[source]
            if not node.users and node.op != "output":
                del self.values[node]
        self._spent.clear()


def _is_low(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dtype in LOW_DTYPES


def execute(running: GraphExecution, node: fx.Node, rewritten: Rewritten) -> None:
    """Execute one node of a rewritten graph; KernelError names the node that refuses its dtypes."""
    try:
        running.execute(node)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        info = rewritten.captured.nodes.get(rewritten.origins.get(node.name, ""))
        raise KernelError(info, error) from error


def try_kernels(
    rewritten: Rewritten,
    inputs: Sequence[Any],
    recorded: Mapping[str, Any],
    known: Collection[str] = (),
) -> dict[str, str]:
    """The operators, with overload, whose kernels do not take the dtypes that they get, and what
    each said. `recorded` are the captured graph's values, as in `Trace`.

    Layers repeat: each operator is called once for each set of dtypes, shapes and numbers that it
    gets, on zeros. Where that fails, or where a node's values are not known well enough, the graph
    is run on `inputs`, which alone can say that a kernel is missing. What is missing runs in FP32
    there, so that one run finds them all. Raises KernelError where that fails, too, and for one of
    the `known`, that were found before.
    """
    refused: dict[str, str] = {}
    if _run_on_zeros(rewritten, recorded):
        return refused
    running = GraphExecution(rewritten.graph_module, inputs)
    for node in rewritten.graph_module.graph.nodes:
        try:
            execute(running, node, rewritten)
        except KernelError as error:
            if error.info is None or error.info.op in known:
                raise
            try:
                running.execute_in_fp32(node)
            except (RuntimeError, TypeError, ValueError):
                raise error from error.__cause__
            refused.setdefault(error.info.op, error.cause)
        running.free()
    return refused


def _run_on_zeros(rewritten: Rewritten, recorded: Mapping[str, Any]) -> bool:
    """Whether each kernel takes zeros in the dtypes and shapes that it gets."""

    def known(node: fx.Node) -> Any:
        number = recorded.get(rewritten.origins.get(node.name, ""))
        return number if isinstance(number, int | float) else _what_is_known(node)

    tried: set[str] = set()
    for node in rewritten.graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                return False
            continue  # what takes tuples apart, and computes with sizes
        if node.target is torch.ops.aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            continue  # a cast, which every device has
        try:
            asked = fx.map_arg((node.args, node.kwargs), known)
        except LookupError:
            return False
        signature = f"{node.target} {asked}"
        if signature in tried:
            continue
        tried.add(signature)
        args, kwargs = pytree.tree_map_only(_Known, _Known.zeros, asked)
        try:
            node.target(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    return True


@dataclass(frozen=True)
class _Known:
    """A tensor, but for its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    def zeros(self) -> torch.Tensor:
        """Such a tensor; one whose elements share memory shares it here."""
        reach = [(n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)]
        size = 0 if 0 in self.shape else 1 + sum(reach)
        base = torch.zeros(size, dtype=self.dtype, device=self.device)
        return base.as_strided(self.shape, self.stride)


def _what_is_known(node: fx.Node) -> _Known:
    value, dtype = node.meta.get("recorded"), node.meta.get("dtype")
    if value is None or dtype is None or len(value.stride) != len(value.shape):
        raise LookupError(node.name)
    return _Known(dtype, value.shape, value.stride, value.device)


def runner_of(
    rewritten: Rewritten,
    owner: nn.Module,
    run: Callable[..., Any] | None = None,
    in_place: frozenset[int] = frozenset(),
) -> GraphRunner:
    """A rewritten graph, callable as the module `owner` is, over its tensors; `run` and `in_place`
    as in `GraphRunner`."""
    graph, captured = rewritten.graph_module, rewritten.captured
    return GraphRunner(graph, captured.signature, captured.constants, owner, run, in_place)
