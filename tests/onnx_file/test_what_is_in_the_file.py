"""What is in an ONNX file: nodes, weights, inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.onnx_file import write as onnx_export
from amp_convert.onnx_file.write import OnnxTensor, export_onnx
from tests.onnx_file.perceptron import Perceptron, perceptron
from tests.onnx_files import (
    exported,
    props,
    run,
    tensor_leaves,
    weights,
)
from tests.zoo import converted

# --- what is in the file -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_model_is_written_as_this(tmp_path: Path) -> None:
    mixed, _ = perceptron()
    assert mixed.plan.low_nodes() == 3
    path = tmp_path / "perceptron.onnx"
    model = export_onnx(mixed, path)
    batch = ("batch", 64)
    assert model == onnx_export.OnnxModel(
        path=str(path),
        external_data=None,
        bytes=path.stat().st_size,
        dtype="float16",
        io_types="keep",
        opset=20,
        producer=f"amp-convert {amp.__version__} with PyTorch {torch.__version__}",
        inputs=(OnnxTensor("x", "float32", batch),),
        outputs=(OnnxTensor("output", "float32", batch),),
        nodes=5,
        casts=2,
        nodes_by_dtype={"float16": 4, "float32": 1},
        lost_state=(),
    )
    proto = onnx.load(path)
    assert [n.op_type for n in proto.graph.node] == ["Cast", "Gemm", "Relu", "Gemm", "Cast"]
    cast, first, *_ = proto.graph.node
    assert props(cast) == {
        "amp_convert.fx": "_to_copy_default",
        "amp_convert.dtype": "float16",
        "amp_convert.layer": "first",
        "amp_convert.reason": "cast to float16 for first/aten.linear#0",
    }
    decision = mixed.plan.eval[0]
    assert props(first) == {
        "amp_convert.fx": "linear",
        "amp_convert.node": "first/aten.linear#0",
        "amp_convert.layer": "first",
        "amp_convert.dtype": "float16",
        "amp_convert.rule": decision.rule,
        "amp_convert.reason": decision.why,
        "amp_convert.location": decision.location,
    }
    stored = weights(proto)
    state = mixed.captured.model.state_dict()
    assert sorted(stored) == sorted(state)
    for name, array in stored.items():
        np.testing.assert_array_equal(array, state[name].half().numpy())


@pytest.mark.slow
def test_the_reference_evaluator_computes_what_pytorch_computes(tmp_path: Path) -> None:
    """ONNX's own definition of each operator, in NumPy: within one step of the FP16 result."""
    mixed, x = perceptron()
    export_onnx(mixed, tmp_path / "model.onnx")
    with torch.no_grad():
        want = mixed.eval()(x).numpy()
    (have,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})
    step = np.spacing(np.abs(want).max().astype(np.float16)).astype(np.float32)
    assert have.dtype == np.float32
    assert np.abs(have - want).max() <= step


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_opset_can_be_set(opset: int, tmp_path: Path) -> None:
    class Gelu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(F.linear(x, torch.ones(3, 3)))

    model = export_onnx(amp.convert(Gelu(), torch.randn(2, 3)), tmp_path / "m.onnx", opset=opset)
    proto = onnx.load(model.path)
    assert (model.opset, [entry.version for entry in proto.opset_import]) == (opset, [opset])
    assert ("Gelu" in {node.op_type for node in proto.graph.node}) == (opset >= 20)


@pytest.mark.slow
def test_bf16_convolution_needs_opset_22(tmp_path: Path) -> None:
    mixed = converted("cnn", "default", torch.bfloat16)
    assert exported("cnn", torch.bfloat16).opset == 22
    with pytest.raises(UnsupportedModelError, match=r"opset 20.*Try a later opset, up to 23\.$"):
        export_onnx(mixed, tmp_path / "m.onnx", opset=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_norm_has_one_dtype(tmp_path: Path) -> None:
    """The CPU keeps FP32 scale and bias beside a low input; ONNX has one dtype for the three."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    mixed = amp.convert(model, torch.randn(4, 8))
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert file.casts == 2
    scale = weights(onnx.load(file.path))["1.weight"]
    np.testing.assert_array_equal(scale, model[1].weight.detach().half().numpy())


@pytest.mark.slow
def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(500, 32)
            self.head = nn.Linear(32, 500, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    file = export_onnx(amp.convert(Tied(), torch.randint(0, 500, (2, 7))), tmp_path / "m.onnx")
    large = [array for array in weights(onnx.load(file.path)).values() if array.size >= 500 * 32]
    assert [(array.dtype, array.shape) for array in large] == [(np.float16, (500, 32))]


@pytest.mark.slow
def test_lstm_weights_are_in_the_order_of_onnx_already() -> None:
    proto = onnx.load(exported("lstm").path)
    stored = {tensor.name for tensor in proto.graph.initializer}
    layers = [node for node in proto.graph.node if node.op_type == "LSTM"]
    assert len(layers) == 2
    for node in layers:
        assert set(node.input[1:4]) <= stored


@pytest.mark.slow
def test_the_file_does_not_name_folders_of_this_machine() -> None:
    content = Path(exported("bert").path).read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert str(Path(torch.__file__).parent.parent).encode() not in content


# --- structures ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_outputs_of_every_kind(tmp_path: Path) -> None:
    """An input, a weight and one result twice; integers, and what is no tensor."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, flag: bool, ids: torch.Tensor) -> dict[str, Any]:
            y = self.linear(x)
            return {
                "y": y, "again": y, "x": x, "bias": self.linear.bias, "none": None,
                "ids": ids + 1, "top": y.argmax(-1), "pair": [y > 0, 3],
            }  # fmt: skip

    model = Odd().eval()
    x, ids = torch.randn(2, 4), torch.arange(2)
    mixed = amp.convert(model, (x, True, ids))
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert [value.name for value in file.inputs] == ["x", "ids"]
    names = ["y", "again", "x_1", "bias", "ids_1", "top", "pair[0]"]
    have = dict(zip([value.name for value in file.outputs], run(file, x, ids), strict=True))
    assert list(have) == names
    with torch.no_grad():
        want = tensor_leaves(mixed.eval()(x, True, ids))
    for name in ("x", "ids"):  # no two values of an ONNX graph have one name
        have[name] = have.pop(f"{name}_1")
    assert {n: t.dtype for n, t in have.items()} == {n: t.dtype for n, t in want.items()}
    for name in ("x", "bias", "ids", "top", "pair[0]"):
        assert torch.equal(have[name], want[name]), name
    torch.testing.assert_close(have["y"], want["y"], rtol=2e-3, atol=1e-3)
    assert torch.equal(have["y"], have["again"])


@pytest.mark.slow
def test_state_is_left_out_and_said(tmp_path: Path) -> None:
    class Counting(nn.Module):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return self.linear(x) * self.seen

    mixed = amp.convert(Counting().eval(), torch.randn(2, 4))
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert file.lost_state == ("seen",)
    assert [value.name for value in file.outputs] == ["output"]


@pytest.mark.slow
def test_a_batch_of_one_may_grow(tmp_path: Path) -> None:
    mixed = amp.convert(Perceptron(), torch.randn(1, 64))
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert file.inputs[0].shape == ("batch", 64)
    assert run(file, torch.randn(5, 64))[0].shape == (5, 64)


@pytest.mark.slow
def test_sizes_that_need_not_agree_have_names_of_their_own(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return F.linear(left, torch.ones(4, 4)) @ F.linear(right, torch.ones(4, 4)).T

    mixed = amp.convert(Pair(), (torch.randn(3, 4), torch.randn(5, 4)))
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert [value.shape for value in file.inputs] == [("left_batch", 4), ("right_batch", 4)]
    assert file.outputs[0].shape == ("left_batch", "right_batch")


@pytest.mark.slow
def test_an_input_is_named_by_its_path(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, data: dict[str, Any], *, scale: torch.Tensor) -> torch.Tensor:
            return F.linear(data["a"], torch.ones(4, 4)) * scale + data["b"][0]

    data = {"a": torch.randn(2, 4), "b": [torch.randn(2, 4)]}
    mixed = amp.convert(Nested(), (data,), {"scale": torch.randn(2, 1)})
    file = export_onnx(mixed, tmp_path / "m.onnx")
    assert [value.name for value in file.inputs] == ["data['a']", "data['b'][0]", "scale"]
