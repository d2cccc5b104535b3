"""Single ONNX nodes, against PyTorch's own arithmetic in the same dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, parser

from amp_convert.validate.onnx.node_kernels import Kernels, constant, reads
from tests.bits import same_bits

ELEMENTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}


def single(text: str) -> ir.Node:
    """The first node of a graph in ONNX's text format."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 22]> main {text}')
    return next(iter(ir.serde.deserialize_model(proto).graph))


def run(node: ir.Node, *tensors: torch.Tensor, kernels: Kernels | None = None) -> Any:
    given = dict(zip(reads(node), tensors, strict=True))
    results = (kernels or Kernels({"": 22})).run(node, given.__getitem__)
    assert list(results) == [value for value in node.outputs if value.name]
    return list(results.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float"])
def test_results_are_rounded_to_the_dtype_in_the_file(dtype: str) -> None:
    node = single(f"({dtype}[2] x, {dtype}[2] y) => ({dtype}[2] z) {{ z = Mul(x, y) }}")
    torch.manual_seed(0)
    x, y = (torch.randn(2).to(ELEMENTS[dtype]) for _ in range(2))
    (z,) = run(node, x, y)
    assert same_bits(z, x * y)


@pytest.mark.parametrize(("dtype", "number"), [("float16", 10), ("bfloat16", 16)])
def test_a_cast_rounds(dtype: str, number: int) -> None:
    node = single(f"(float[3] x) => ({dtype}[3] y) {{ y = Cast<to={number}>(x) }}")
    x = torch.tensor([1 / 3, 70000.0, 1e-9])
    (y,) = run(node, x)
    assert same_bits(y, x.to(ELEMENTS[dtype]))


def test_an_overflow_is_one_whatever_the_provider_does_inside() -> None:
    node = single("(float16[1] x, float16[1] y) => (float16[1] z) { z = Mul(x, y) }")
    (z,) = run(node, torch.tensor([1000.0]).half(), torch.tensor([100.0]).half())
    assert torch.isinf(z).all()


def test_equal_nodes_share_a_session() -> None:
    kernels = Kernels({"": 22})
    for name in ("a", "b"):
        node = single(f"(float[2] {name}) => (float[2] z) {{ z = Relu({name}) }}")
        run(node, torch.zeros(2), kernels=kernels)
    run(single("(float[2] a) => (float[2] z) { z = Neg(a) }"), torch.zeros(2), kernels=kernels)
    run(single("(float16[2] a) => (float16[2] z) { z = Relu(a) }"), torch.zeros(2).half(),
        kernels=kernels)  # fmt: skip
    assert len(kernels._sessions) == 3


def test_inputs_that_are_left_out_stay_so() -> None:
    node = single('(float[3] x, float m) => (float[3] y) { y = Clip(x, "", m) }')
    (y,) = run(node, torch.tensor([-1.0, 0.5, 2.0]), torch.tensor(1.0))
    assert y.tolist() == [-1.0, 0.5, 1.0]


def test_several_results() -> None:
    node = single(
        "(float16[4] x) => (float16[2] y, float16[2] z) { y, z = Split<num_outputs=2>(x) }"
    )
    y, z = run(node, torch.arange(4.0).half())
    assert (y.tolist(), z.tolist()) == ([0.0, 1.0], [2.0, 3.0])


def test_what_a_branch_takes_from_outside_is_read_too() -> None:
    node = single(
        """(bool c, bfloat16[2] a) => (bfloat16[2] y) {
            y = If(c) <then_branch = left () => (bfloat16[2] l) { l = Neg(a) },
                       else_branch = right () => (bfloat16[2] r) { r = Add(a, a) }>
        }"""
    )
    assert [value.name for value in reads(node)] == ["c", "a"]


def test_constants_of_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool):
        tensor = torch.tensor([0, 1, 3]).to(dtype)
        number = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16,
                  "float32": TensorProto.FLOAT, "int64": TensorProto.INT64,
                  "bool": TensorProto.BOOL}[str(dtype).removeprefix("torch.")]  # fmt: skip
        raw = tensor.view(torch.uint8).numpy().tobytes()
        proto = helper.make_tensor("t", number, [3], raw, raw=True)
        assert same_bits(constant(ir.serde.deserialize_tensor(proto)), tensor)
    assert np.array_equal(constant(ir.tensor([2.0])).numpy(), [2.0])
