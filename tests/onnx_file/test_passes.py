"""What is tidied in an ONNX graph, as whole graphs before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper, parser, shape_inference

from amp_convert.onnx_file.passes import fold_constants, name_borders, tidy

TAG = "amp_convert.fx"
LAST = 2**63 - 1


def graph(text: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX's text format, with initializers."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> main {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(shape_inference.infer_shapes(proto))


def lines(model: ir.Model) -> list[str]:
    """The nodes, one a line: `y = Cast(x) float16`."""
    found = []
    for node in model.graph:
        results = ", ".join(v.name or "" for v in node.outputs)
        sources = ", ".join(v.name or "" for v in node.inputs if v is not None)
        to = node.attributes.get("to")
        dtype = f" {ir.DataType(to.as_int()).name.lower()}" if to else ""
        found.append(f"{results} = {node.op_type}({sources}){dtype}")
    return found


# to = 1 is float32, 10 is float16, 11 is float64, 16 is bfloat16
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            "(float[2] x) => (float[2] y) { a = Identity(x) y = Relu(a) }",
            ["y = Relu(x)"],
            id="identity",
        ),
        pytest.param(
            "(float[2] x) => (float[2] y) { a = Cast<to=1>(x) y = Relu(a) }",
            ["y = Relu(x)"],
            id="cast to the same dtype",
        ),
        pytest.param(
            "(float16[2] x) => (float16[2] y) { a = Cast<to=1>(x) b = Cast<to=10>(a) y = Relu(b) }",
            ["y = Relu(x)"],
            id="to a wider dtype and back",
        ),
        pytest.param(
            "(float[2] x) => (float[2] y) { a = Cast<to=10>(x) b = Cast<to=1>(a) y = Relu(b) }",
            ["a = Cast(x) float16", "b = Cast(a) float", "y = Relu(b)"],
            id="a rounding stays",
        ),
        pytest.param(
            "(float16[2] x) => (float16[2] y){ a = Cast<to=16>(x) b = Cast<to=10>(a) y = Relu(b) }",
            ["a = Cast(x) bfloat16", "b = Cast(a) float16", "y = Relu(b)"],
            id="BF16 does not hold FP16",
        ),
        pytest.param(
            "(float[2] x) => (float16[2] y)"
            "{ a = Cast<to=10>(x) b = Relu(a) c = Cast<to=10>(x) y = Add(b, c) }",
            ["a = Cast(x) float16", "b = Relu(a)", "y = Add(b, a)"],
            id="one cast for all readers",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[b, 3] y)"
            f"<int64[2] s = {{0, 0}}, int64[2] e = {{{LAST}, {LAST}}}>"
            "{ a = Slice(x, s, e) y = Relu(a) }",
            ["y = Relu(x)"],
            id="a slice that takes everything",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[c, 3] y)"
            f"<int64[1] s = {{1}}, int64[1] e = {{{LAST}}}, int64[1] i = {{0}}>"
            "{ a = Slice(x, s, e, i) y = Relu(a) }",
            ["a = Slice(x, s, e, i)", "y = Relu(a)"],
            id="a slice that takes all but the first",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[c, 3] y)"
            "<int64[1] s = {0}, int64[1] e = {-1}>"
            "{ a = Slice(x, s, e) y = Relu(a) }",
            ["a = Slice(x, s, e)", "y = Relu(a)"],
            id="a slice that takes all but the last",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[c, 3] y)"
            f"<int64[1] s = {{0}}, int64[1] e = {{{LAST}}}, int64[1] i = {{2}}>"
            "{ a = Slice(x, s, e, s, i) y = Relu(a) }",
            ["a = Slice(x, s, e, s, i)", "y = Relu(a)"],
            id="a slice of every other",
        ),
        pytest.param(
            "(float[b, 3] x, int64[1] e) => (float[c, 3] y)"
            "<int64[1] s = {0}> { a = Slice(x, s, e) y = Relu(a) }",
            ["a = Slice(x, s, e)", "y = Relu(a)"],
            id="a slice up to an end that is not known",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[b, 3] y, float[b, 3] z)"
            "<int64[1] m = {-1}, int64[1] n = {3}, int64[1] k = {3}>"
            "{ a = Shape<end=1>(x) b = Reshape(a, m) c = Concat<axis=0>(b, n)"
            " d = Shape<end=1>(x) e = Reshape(d, m) f = Concat<axis=0>(e, k)"
            " y = Reshape(x, c) z = Reshape(x, f) }",
            [
                "a = Shape(x)",
                "b = Reshape(a, m)",
                "c = Concat(b, n)",
                "y = Reshape(x, c)",
                "z = Reshape(x, c)",
            ],
            id="a size is computed once, and those that read it stay two",
        ),
        pytest.param(
            "(int64[b] x, float[n] t) => (float[b] y, float[b] z) <int64[1] n = {3}>"
            "{ a = Add(x, n) b = Add(x, n) y = Gather(t, a) z = Gather(t, b) }",
            ["a = Add(x, n)", "b = Add(x, n)", "y = Gather(t, a)", "z = Gather(t, b)"],
            id="what the user gives is no size",
        ),
        pytest.param(
            "(float[b, 3] x) => (float[b, 3] y)"
            "{ a = Shape<end=1>(x) d = Shape<start=1>(x) c = Concat<axis=0>(a, d)"
            " y = Reshape(x, c) }",
            ["a = Shape(x)", "d = Shape(x)", "c = Concat(a, d)", "y = Reshape(x, c)"],
            id="other attributes, another size",
        ),
        pytest.param(
            "(float[2] x) => (float16[2] y) { a = Cast<to=10>(x) b = Cast<to=16>(x) y = Relu(a) }",
            ["a = Cast(x) float16", "y = Relu(a)"],
            id="a cast that nothing reads",
        ),
        pytest.param(
            "(float16[2] x) => (float16[2] y, float[2] z)"
            "{ a = Cast<to=1>(x) z = Relu(a) y = Cast<to=10>(a) }",
            ["a = Cast(x) float", "z = Relu(a)", "y = Identity(x)"],
            id="an input that is an output passes through an identity",
        ),
    ],
)
def test_what_is_not_needed(before: str, after: list[str]) -> None:
    model = graph(before)
    names = [[v.name or "" for v in end] for end in (model.graph.inputs, model.graph.outputs)]
    tidy(model, TAG)
    name_borders(model, *names)
    assert lines(model) == after


def test_a_stand_in_takes_over_the_tags() -> None:
    model = graph("(float[2] x) => (float[2] y) { a = Relu(x) b = Identity(a) y = Neg(b) }")
    for value in (v for node in model.graph for v in node.outputs):
        value.metadata_props[TAG] = f"fx_{value.name}"
    tidy(model, TAG)
    tags = {v.name: v.metadata_props[TAG] for node in model.graph for v in node.outputs}
    assert tags == {"a": "fx_a fx_b", "y": "fx_y"}


# --- constants -----------------------------------------------------------------------------------


def test_a_weight_is_moved_ahead_of_time() -> None:
    weight = np.arange(2048, dtype=np.float16).reshape(32, 64)
    text = "(float16[2,64] x) => (float16[2,32] y) { t = Transpose(w) y = MatMul(x, t) }"
    model = graph(text, w=weight)
    fold_constants(model)
    tidy(model, TAG)
    assert lines(model) == ["y = MatMul(x, w_moved)"]
    (value,) = model.graph.initializers.values()
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), weight.T)


def test_a_weight_with_another_reader_is_not_stored_twice() -> None:
    text = """(float16[2,64] x, int64[3] i) => (float16[2,32] y, float16[3,64] z)
        { t = Transpose(w) y = MatMul(x, t) z = Gather(w, i) }"""
    model = graph(text, w=np.ones((32, 64), np.float16))
    fold_constants(model)
    tidy(model, TAG)
    assert lines(model) == ["t = Transpose(w)", "y = MatMul(x, t)", "z = Gather(w, i)"]
    assert list(model.graph.initializers) == ["w"]


def test_equal_constants_are_stored_once() -> None:
    text = "(float16[2,2] x) => (float16[2,2] y) { a = Add(x, v) b = Mul(a, w) y = Sub(b, u) }"
    ones = np.ones((2, 2), np.float16)
    model = graph(text, v=ones, w=ones.copy(), u=ones.astype(np.float32).astype(np.float16) * 2)
    tidy(model, TAG)
    assert lines(model) == ["a = Add(x, v)", "b = Mul(a, v)", "y = Sub(b, u)"]
    assert sorted(model.graph.initializers) == ["u", "v"]


def test_zero_and_minus_zero_are_not_equal() -> None:
    text = "(float16[1] x) => (float16[1] y) { a = Add(x, v) y = Mul(a, w) }"
    model = graph(text, v=np.array([0.0], np.float16), w=np.array([-0.0], np.float16))
    tidy(model, TAG)
    assert sorted(model.graph.initializers) == ["v", "w"]


# --- names ---------------------------------------------------------------------------------------


def test_whatever_has_the_name_of_an_input_gives_way() -> None:
    text = "(float16[1] a) => (float16[1] y) { b = Add(a, x) y = Mul(b, w) }"
    model = graph(text, x=np.array([1.0], np.float16), w=np.array([2.0], np.float16))
    name_borders(model, ["x"], ["w"])
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["w"]
    assert len({*model.graph.initializers, "x", "w", "b"}) == 5


def test_a_weight_and_a_value_can_be_outputs_once_more() -> None:
    text = "(float16[1] x) => (float16[1] y) { y = Add(x, w) }"
    model = graph(text, w=np.array([2.0], np.float16))
    weight, result = model.graph.initializers["w"], model.graph.outputs[0]
    model.graph.outputs.extend([weight, result])
    name_borders(model, ["x"], ["first", "second", "third"])
    proto = ir.serde.serialize_model(model)
    assert [o.name for o in proto.graph.output] == ["first", "second", "third"]
    assert all(o.type.tensor_type.elem_type == TensorProto.FLOAT16 for o in proto.graph.output)
    assert [node.op_type for node in proto.graph.node] == ["Add", "Identity", "Identity"]
