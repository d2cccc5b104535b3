"""Which dtypes come out of a node, and which of its arguments are tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.plan.dtype_flow import (
    NoKernelError,
    Precision,
    propagate,
    tensor_arguments,
)
from tests.plan.traced_values import Traced, described, effect, floats, mixed_sum

aten = torch.ops.aten


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# --- what comes out ------------------------------------------------------------------------------


def test_a_tensor_without_dimensions_gives_way_to_one_with() -> None:
    """The same op on the same dtypes, three times: the ranks decide."""

    def scale(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> Any:
        low_matrix, low_number = aten.mul(x, x), aten.mul(factor, factor)
        return (
            aten.add(low_matrix, factor),
            aten.add(low_matrix, y),
            aten.add(y, low_number),
            aten.add(low_number, y),
        )

    traced = Traced(scale, floats(2, 3), floats(2, 3), torch.tensor(2.0))
    precision = dict.fromkeys(["mul", "mul_1"], Precision.LOW)
    precision |= dict.fromkeys(["add", "add_1", "add_2", "add_3"], Precision.AS_IS)
    flows = traced.flows(precision)
    assert [flows[n].result for n in ("add", "add_1", "add_2", "add_3")] == [F16, F32, F32, F32]


def test_low_and_fp64_promote_as_the_operator_says() -> None:
    traced = Traced(aten.add, floats(2), floats(2, dtype=F64))
    assert effect(traced.flows({"add": Precision.LOW})["add"]) == ((F16, None), F64)


def test_a_dtype_among_the_constants_decides_the_result() -> None:
    def sums(x: torch.Tensor) -> Any:
        low = aten.mul(x, x)
        return aten.sum(low, [0]), aten.sum(low, [0], dtype=F32), aten.sum(low, [0], dtype=F64)

    traced = Traced(sums, floats(2, 3))
    names = ["sum_1", "sum_2", "sum_3"]
    flows = traced.flows({"mul": Precision.LOW} | dict.fromkeys(names, Precision.LOW))
    assert [flows[name].result for name in names] == [F16, F32, F64]


def test_comparisons_and_indices_keep_their_dtypes() -> None:
    traced = Traced(lambda x: (aten.gt(x, 0.5), aten.argmax(x, 1)), floats(2, 3))
    flows = traced.flows({"gt": Precision.LOW, "argmax": Precision.LOW})
    assert effect(flows["gt"]) == ((F16,), torch.bool)
    assert effect(flows["argmax"]) == ((F16,), torch.int64)


def test_every_tensor_of_a_list_has_its_own_cast() -> None:
    def join(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return aten.cat([aten.mul(x, x), y, aten.mul(y, y), x], 1)

    traced = Traced(join, floats(2, 3), floats(2, 3))
    precision = {"mul": Precision.LOW, "mul_1": Precision.LOW}
    for wanted, inputs, result in [
        (Precision.LOW, (None, F16, None, F16), F16),
        (Precision.WIDEST, (F32, None, F32, None), F32),
        (Precision.AS_IS, (None,) * 4, F32),
    ]:
        assert effect(traced.flows(precision | {"cat": wanted})["cat"]) == (inputs, result)


def test_every_part_of_a_split_is_as_low_as_the_whole() -> None:
    def parts(x: torch.Tensor) -> torch.Tensor:
        left, right = aten.split(aten.mul(x, x), 2, 1)
        return aten.add(left, right)

    traced = Traced(parts, floats(2, 4))
    flows = traced.flows({"mul": Precision.LOW, "split": Precision.LOW, "add": Precision.LOW})
    assert list(flows["split"].result) == [F16, F16]
    assert [flows[n].result for n in ("getitem", "getitem_1")] == [F16, F16]
    assert effect(flows["add"]) == ((None, None), F16)
    kept = traced.flows({"mul": Precision.LOW, "add": Precision.LOW})
    assert kept["split"].inputs == (F32,)
    assert effect(kept["add"]) == ((F16, F16), F16)


def test_values_and_indices_of_one_node() -> None:
    traced = Traced(lambda x: aten.max(x, 1), floats(2, 3))
    name = next(n.name for n in traced.graph.nodes if n.op == "call_function")
    flow = traced.flows({name: Precision.LOW})[name]
    assert flow.inputs == (F16,)
    assert tuple(flow.result) == (F16, torch.int64)


def interpolated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`lerp` does not promote: with one low value it refuses."""
    return aten.lerp(aten.mul(x, x), y, 0.5)


def test_a_refusal_names_the_node() -> None:
    traced = Traced(interpolated, floats(2, 3), floats(2, 3))
    with pytest.raises(NoKernelError, match=r"^lerp: expected dtype") as raised:
        traced.flows({"mul": Precision.LOW, "lerp": Precision.AS_IS})
    assert (raised.value.node, raised.value.cause) == ("lerp", str(raised.value.__cause__))
    flows = traced.flows({"mul": Precision.LOW, "lerp": Precision.FULL})
    assert effect(flows["lerp"]) == ((F32, None), F32)


def test_a_refusal_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch logs each with a traceback, which is noise for who only wants a plan."""
    traced = Traced(interpolated, floats(2, 3), floats(2, 3))
    with caplog.at_level("WARNING"), pytest.raises(NoKernelError):
        traced.flows({"mul": Precision.LOW, "lerp": Precision.AS_IS})
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_the_recorded_values_are_left_alone() -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    before, code = dict(traced.values), str(traced.graph)
    traced.flows({"mul": Precision.LOW, "add": Precision.LOW})
    assert traced.values == before
    assert str(traced.graph) == code


def graph_of(op: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, dict[str, Any]]:
    """A call of `op` on placeholders named by their text, and their values, all FP32."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def placed(leaf: Any) -> Any:
        if isinstance(leaf, str):
            made.setdefault(leaf, graph.placeholder(leaf))
        return made.get(leaf, leaf)

    args, kwargs = pytree.tree_map(placed, (args, kwargs))
    call = graph.call_function(op, args, kwargs)
    return call, {node.name: described(floats(3)) for node in made.values()}


# --- arguments -----------------------------------------------------------------------------------


def test_tensor_arguments_have_their_schema_names_in_call_order() -> None:
    def arguments(op: Any, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        node, values = graph_of(op, *args, **kwargs)
        return [(name, producer.name) for name, producer in tensor_arguments(node, values)]

    assert arguments(aten.index.Tensor, "x", [None, "i"]) == [("self", "x"), ("indices", "i")]
    assert arguments(aten.cat.default, ["x", "y", "x"], 1) == [("tensors", n) for n in "xyx"]
    assert arguments(aten.layer_norm.default, "x", [3], bias="b", weight="w") == [
        ("input", "x"),
        ("bias", "b"),
        ("weight", "w"),
    ]


def test_keywords_are_cast_like_any_argument() -> None:
    node, values = graph_of(aten.layer_norm.default, "x", [3], bias="b", weight="w")
    node.graph.output(node)
    values[node.name] = described(floats(3))
    (flow,) = propagate(node.graph, values, {node.name: Precision.LOW}, F16, device="cuda").values()
    assert effect(flow) == ((F16, F16, F16), F16)


def test_sizes_are_no_tensor_arguments() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    graph.output(graph.call_function(aten.expand.default, (x, [size, 3])))
    values = {"x": described(floats(2, 1)), "sym_size_int": 2, "expand_default": None}
    found = tensor_arguments(next(n for n in graph.nodes if n.name == "expand_default"), values)
    assert [producer.name for _, producer in found] == ["x"]
