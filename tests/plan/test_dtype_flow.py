"""Dtypes through hand-made graphs: what each precision casts, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Value
from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.dtype_flow import (
    Flow,
    NoKernelError,
    Precision,
    propagate,
    tensor_arguments,
)

aten = torch.ops.aten
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Recorder(fx.Interpreter):
    """Shapes and dtypes of an FP32 run, as capturing records them."""

    def record(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        self.values: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = pytree.tree_map(described, result)
        return result


def described(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return Value(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)


class Traced:
    """The graph of a function of tensors. Nodes are called by their FX names, such as "add_1"."""

    def __init__(self, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
        self.graph: fx.Graph = make_fx(function, pre_dispatch=True)(*inputs).graph
        module = fx.GraphModule({}, self.graph)
        self.values = Recorder(module).record(inputs)

    def flows(
        self,
        precision: Mapping[str, Precision],
        *,
        low: torch.dtype = F16,
        device: str = "cpu",
    ) -> dict[str, Flow]:
        return propagate(self.graph, self.values, precision, low, device)

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)


def floats(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).reshape(shape).to(dtype)


def effect(flow: Flow) -> tuple[Any, Any]:
    """What is cast on the way in, and the dtypes on the way out."""
    return flow.inputs, flow.result


# --- what each precision casts -------------------------------------------------------------------


def mixed_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`mul` is low, so `add` sees one low and one FP32 value."""
    return aten.add(aten.mul(x, x), y)


@pytest.mark.parametrize(
    ("precision", "inputs", "result"),
    [
        (Precision.ORIGINAL, (F32, None), F32),
        (Precision.LOW, (None, F16), F16),
        (Precision.FULL, (F32, None), F32),
        (Precision.WIDEST, (F32, None), F32),
        (Precision.AS_IS, (None, None), F32),
    ],
)
def test_a_low_and_an_fp32_input(
    precision: Precision, inputs: tuple[torch.dtype | None, ...], result: torch.dtype
) -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW, "add": precision})
    assert effect(flows["mul"]) == ((F16, F16), F16)
    assert effect(flows["add"]) == (inputs, result)


@pytest.mark.parametrize(
    ("precision", "inputs", "result"),
    [
        (Precision.ORIGINAL, (F32, F32), F32),
        (Precision.LOW, (None, None), BF16),
        (Precision.FULL, (F32, F32), F32),
        (Precision.WIDEST, (None, None), BF16),
        (Precision.AS_IS, (None, None), BF16),
    ],
)
def test_two_low_inputs(
    precision: Precision, inputs: tuple[torch.dtype | None, ...], result: torch.dtype
) -> None:
    traced = Traced(lambda x: aten.add(y := aten.mul(x, x), y), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW, "add": precision}, low=BF16)
    assert effect(flows["add"]) == (inputs, result)


def test_a_node_that_is_not_decided_about_gets_its_original_dtypes() -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW})
    assert effect(flows["add"]) == ((F32, None), F32)


def test_without_a_low_node_nothing_is_cast() -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.FULL, "add": Precision.WIDEST})
    assert {name: effect(flow) for name, flow in flows.items()} == {
        "mul": ((None, None), F32),
        "add": ((None, None), F32),
    }


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, F64, torch.complex64])
def test_integers_booleans_fp64_and_complex_values_are_never_cast(
    precision: Precision, dtype: torch.dtype
) -> None:
    traced = Traced(aten.mul, floats(2, 3), torch.ones(2, 3, dtype=dtype))
    flow = traced.flows({"mul": precision})["mul"]
    assert flow.inputs[1] is None
    assert flow.inputs[0] == (F16 if precision is Precision.LOW else None)


def test_what_the_model_itself_keeps_in_fp16_is_fp32_only_where_autocast_makes_it_so() -> None:
    """`x` is FP16 in the original. Lowering to BF16 leaves it alone."""
    traced = Traced(aten.add, floats(2, dtype=F16), floats(2))

    def inputs(precision: Precision) -> tuple[torch.dtype | None, ...]:
        return traced.flows({"add": precision}, low=BF16)["add"].inputs

    assert inputs(Precision.ORIGINAL) == (None, None)
    assert inputs(Precision.LOW) == (None, BF16)
    assert inputs(Precision.FULL) == inputs(Precision.WIDEST) == (F32, None)


# --- parameters that the kernel takes in FP32 ----------------------------------------------------


def test_batch_normalisation_keeps_its_statistics_and_parameters() -> None:
    def normalise(x: torch.Tensor, weight: torch.Tensor, running: torch.Tensor) -> Any:
        return aten._native_batch_norm_legit_no_training(
            aten.mul(x, x), weight, weight, running, running, 0.1, 1e-5
        )[0]

    traced = Traced(normalise, floats(2, 4, 3), floats(4), torch.ones(4))
    name = "_native_batch_norm_legit_no_training"
    for device in ("cpu", "cuda", "meta"):
        flow = traced.flows({"mul": Precision.LOW, name: Precision.LOW}, device=device)[name]
        assert flow.inputs == (None,) * 5
        assert flow.result[0] == F16
    picked = traced.flows({"mul": Precision.LOW, name: Precision.LOW})["getitem"]
    assert effect(picked) == ((), F16)


def test_the_saved_statistics_of_training_stay_fp32() -> None:
    """PyTorch's fake kernel calls them low; the real ones, and BatchNorm's backward, do not."""

    def normalise(x: torch.Tensor, weight: torch.Tensor, running: torch.Tensor) -> Any:
        return aten._native_batch_norm_legit_functional(
            aten.mul(x, x), weight, weight, running, running, True, 0.1, 1e-5
        )

    inputs = (floats(2, 4, 3), floats(4), torch.ones(4))
    traced, name = Traced(normalise, *inputs), "_native_batch_norm_legit_functional"
    flow = traced.flows({"mul": Precision.LOW, name: Precision.LOW})[name]
    low = inputs[0].half()
    real = aten._native_batch_norm_legit_functional(
        low * low, inputs[1], inputs[1], inputs[2], inputs[2], True, 0.1, 1e-5
    )
    assert tuple(flow.result) == tuple(t.dtype for t in real) == (F16, F32, F32, F32, F32)


@pytest.mark.parametrize(
    ("device", "inputs"), [("cpu", (F16, None, None)), ("cuda", (F16, F16, F16))]
)
def test_layer_normalisation_keeps_its_parameters_on_the_cpu_only(
    device: str, inputs: tuple[torch.dtype | None, ...]
) -> None:
    traced = Traced(
        lambda x, weight: aten.layer_norm(x, [4], weight, weight), floats(2, 4), floats(4)
    )
    flow = traced.flows({"layer_norm": Precision.LOW}, device=device)["layer_norm"]
    assert effect(flow) == (inputs, F16)


def test_kept_arguments_come_back_to_fp32_where_something_made_them_low() -> None:
    traced = Traced(
        lambda x, y: aten.layer_norm(x, [4], aten.mul(y, y), None), floats(2, 4), floats(4)
    )
    flows = traced.flows({"mul": Precision.LOW, "layer_norm": Precision.LOW})
    assert flows["layer_norm"].inputs == (F16, F32)


def test_group_normalisation_goes_with_layer_normalisation() -> None:
    for op in (aten.group_norm.default, aten.native_group_norm.default):
        assert facts_of_target(op).kept_arguments("cpu") == {"weight", "bias"}
        assert facts_of_target(op).kept_arguments("cuda") == frozenset()
    assert facts_of_target(aten.linear.default).kept_arguments("cpu") == frozenset()
    assert facts_of_target(fx.Graph.output_node).kept_arguments("cpu") == frozenset()


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


# --- arguments -----------------------------------------------------------------------------------


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
