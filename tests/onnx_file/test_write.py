"""ONNX files: the plan's precision in every node, and names, sizes and weights as in the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.onnx_file import write as onnx_export
from amp_convert.onnx_file.write import OnnxTensor, export_onnx
from amp_convert.report.records import NodeRecord
from tests.graphs import damped
from tests.onnx_files import (
    ELEMENTS,
    every_exportable,
    exportable,
    exported,
    ordered_inputs,
    props,
    read,
    run,
    tensor_leaves,
    types,
    weights,
)
from tests.zoo import both_dtypes, converted, example, mode


class Perceptron(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


def perceptron(dtype: torch.dtype = torch.float16, **options: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Perceptron(**options).eval(), torch.randn(4, options.get("width", 64))
    return amp.convert(model, x, dtype=dtype), x


# --- every model ---------------------------------------------------------------------------------


@pytest.mark.slow
@every_exportable
@both_dtypes
def test_each_value_has_the_dtype_of_its_plan(name: str, dtype: torch.dtype) -> None:
    """As ONNX infers it from the operators in the file, for whatever could be found there."""
    proto = read(exported(name, dtype))
    found = types(proto)
    named = {  # FX node -> value
        fx: value.name
        for value in (*proto.graph.value_info, *proto.graph.output)
        for fx in props(value).get("amp_convert.fx", "").split()
    }
    rewritten = converted(name, "default", dtype).rewritten[""]["eval"]
    floating = [d for d in rewritten.decisions.values() if "float" in d.dtype and d.op != "aten.to"]
    checked = 0
    for decision in floating:
        holder = rewritten.values[decision.name].name
        value = named.get(holder) or named.get(decision.name)
        if value is not None:
            assert ELEMENTS[found[value]] == decision.dtype, decision.node
            checked += 1
    # The rest is constant, or passes its input on as it is.
    assert checked >= 0.75 * len(floating)


@pytest.mark.slow
@every_exportable
@both_dtypes
def test_no_cast_is_there_for_nothing(name: str, dtype: torch.dtype) -> None:
    proto = read(exported(name, dtype))
    found = types(proto)
    producers = {value: node for node in proto.graph.node for value in node.output}
    read_by = {value for node in proto.graph.node for value in node.input}
    read_by |= {value.name for value in proto.graph.output}
    casts = [node for node in proto.graph.node if node.op_type == "Cast"]
    assert not [n for n in proto.graph.node if n.op_type in ("CastLike", "Identity", "Constant")]
    assert len({(n.input[0], found[n.output[0]]) for n in casts}) == len(casts), "cast twice"
    for node in casts:
        (source,), (result,) = node.input, node.output
        assert result in read_by, "nothing reads it"
        assert found[source] != found[result], "to the same dtype"
        before = producers.get(source)
        if before is not None and before.op_type == "Cast" and found[source] == TensorProto.FLOAT:
            assert found[before.input[0]] not in (found[result],), "to FP32 and back"
        stored = {tensor.name for tensor in proto.graph.initializer}
        assert source not in stored, "a weight is cast at run time"


@every_exportable
def test_names_order_and_sizes_are_the_models(name: str) -> None:
    model, args, kwargs = example(name)
    proto = onnx.load(exported(name).path)
    assert [value.name for value in proto.graph.input] == list(ordered_inputs(name))
    with mode(model), torch.no_grad():
        outputs = tensor_leaves(model(*args, **kwargs))
    assert [value.name for value in proto.graph.output] == list(outputs)
    for value in proto.graph.input:
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param.endswith("batch"), value.name
        assert all(size.dim_value for size in rest), value.name
    want = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    for value in proto.graph.output:
        assert value.type.tensor_type.elem_type == want[outputs[value.name].dtype]


@every_exportable
def test_nodes_say_what_the_plan_says_of_them(name: str) -> None:
    proto = onnx.load(exported(name).path)
    plan = {d.node: d for d in converted(name).plan.eval}
    silent = []
    for node in proto.graph.node:
        found = {key.removeprefix("amp_convert."): text for key, text in props(node).items()}
        if "node" not in found:
            silent.append(node)
            continue
        row = dataclasses.asdict(NodeRecord.of(plan[found["node"]]))
        keys = ("node", "layer", "dtype", "rule", "reason", "location")
        assert {key: found.get(key, "") for key in keys} == {key: row[key] for key in keys}
    # What is left are casts, and the sizes of inputs.
    for node in silent:
        reason = props(node).get("amp_convert.reason", "")
        assert reason.startswith(("cast to ", "rewriting for ")) or node.op_type in (
            "Shape", "Squeeze", "Gather", "Unsqueeze", "Concat",
        ), node  # fmt: skip


@every_exportable
def test_weights_are_stored_once_in_the_plans_dtype(name: str) -> None:
    """No more bytes than the frozen model has, but for folded masks and positions."""
    proto = onnx.load(exported(name).path)
    frozen = converted(name).freeze()
    held = {t.untyped_storage()._cdata: t for t in frozen.state_dict().values()}
    want = sum(t.numel() * t.element_size() for t in held.values())
    stored = sum(array.nbytes for array in weights(proto).values())
    assert stored <= 1.05 * want


def larger(name: str) -> list[torch.Tensor]:
    """The example inputs with one more in the batch than at export."""
    return [torch.cat([t, t.flip(0)[:1]]) for t in ordered_inputs(name).values()]


@pytest.mark.slow
@exportable("cnn", "lstm", "bert", "t5", "clip")
def test_fp32_files_compute_what_pytorch_computes(name: str) -> None:
    model, _, _ = example(name)
    results = run(exported(name, rules="fp32"), *larger(name))
    with mode(model), torch.no_grad():
        outputs = tensor_leaves(model(**dict(zip(ordered_inputs(name), larger(name), strict=True))))
    for want, have in zip(outputs.values(), results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@every_exportable
def test_fp16_files_take_every_batch_size(name: str) -> None:
    """What stands in a larger batch beside other things is what it was without them."""
    want = run(exported(name), *ordered_inputs(name).values())
    have = run(exported(name), *larger(name))
    for few, more in zip(want, have, strict=True):
        assert len(more) == len(few) + 1 or few.dim() == 0
        first = more[tuple(slice(size) for size in few.shape)]
        torch.testing.assert_close(first, few, rtol=0, atol=2e-2 * float(few.abs().max()))


@pytest.mark.slow
@exportable("cnn", "lstm", "whisper", "clip")
def test_low_borders_leave_out_the_casts_there(name: str) -> None:
    kept, low = exported(name), exported(name, io_types="low")
    for before, after in zip(kept.inputs + kept.outputs, low.inputs + low.outputs, strict=True):
        dtype = "float16" if before.dtype == "float32" else before.dtype
        assert after == OnnxTensor(before.name, dtype, before.shape)
    assert low.casts <= kept.casts
    inputs = [t.half() if t.dtype == torch.float32 else t for t in ordered_inputs(name).values()]
    assert all(t.dtype != torch.float32 for t in run(low, *inputs))


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


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_external_data_lie_beside_the_model(tmp_path: Path) -> None:
    mixed, x = perceptron()
    file = export_onnx(mixed, tmp_path / "m.onnx", external_data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert file.external_data == "m.onnx.data"
    assert file.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    proto = onnx.load(file.path, load_external_data=False)
    places = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"m.onnx.data"}
    inside = export_onnx(mixed, tmp_path / "inside.onnx")
    assert torch.equal(run(file, x)[0], run(inside, x)[0])


@pytest.mark.slow
def test_many_weights_go_into_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, _ = perceptron()
    size = 2 * (64 * 64 + 64) * 2
    monkeypatch.setattr(onnx_export, "EXTERNAL_ABOVE", size)
    assert export_onnx(mixed, tmp_path / "m.onnx").external_data is None
    monkeypatch.setattr(onnx_export, "EXTERNAL_ABOVE", size - 1)
    assert export_onnx(mixed, tmp_path / "m.onnx").external_data == "m.onnx.data"


@pytest.mark.slow
def test_fp16_files_are_half_the_size(tmp_path: Path) -> None:
    mixed, x = perceptron(width=512)
    half = export_onnx(mixed, tmp_path / "half.onnx")
    fp32 = amp.convert(mixed.captured.model, x, rules="fp32")
    whole = export_onnx(fp32, tmp_path / "whole.onnx")
    assert half.bytes / whole.bytes == pytest.approx(0.5, rel=0.01)


@pytest.mark.slow
def test_a_failing_check_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, _ = perceptron()
    (tmp_path / "m.onnx").write_bytes(b"the old one")

    def fails(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no such thing")

    monkeypatch.setattr(onnx.checker, "check_model", fails)
    with pytest.raises(UnsupportedModelError, match="no such thing"):
        export_onnx(mixed, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"the old one"


@pytest.mark.slow
def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    mixed, x = perceptron()
    mixed.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = {key: tensor.clone() for key, tensor in mixed.state_dict().items()}
    export_onnx(mixed, tmp_path / "m.onnx")
    assert mixed.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, mixed.state_dict()[key]) for key, tensor in before.items())
    assert mixed(x).requires_grad


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 cannot be written. Use 18 to 23."),
        ({"opset": 24}, "opset 24 cannot be written. Use 18 to 23."),
        ({"io_types": "half"}, 'io_types is \'half\'. Use "keep" or "low".'),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    mixed, _ = perceptron()
    with pytest.raises(UsageError) as caught:
        export_onnx(mixed, tmp_path / "m.onnx", **options)
    assert str(caught.value) == message


def test_wrong_paths(tmp_path: Path) -> None:
    mixed, _ = perceptron()
    with pytest.raises(UsageError, match=r"is a folder\. Give the name of a file"):
        export_onnx(mixed, tmp_path)
    with pytest.raises(UsageError, match=r"there is no folder .*missing\. Make it first"):
        export_onnx(mixed, tmp_path / "missing" / "m.onnx")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amp_convert.core.optional_packages.find_spec", lambda name: None)
    mixed, _ = perceptron()
    with pytest.raises(UsageError) as caught:
        export_onnx(mixed, tmp_path / "m.onnx")
    assert str(caught.value) == (
        "onnx and onnxscript are not installed. "
        "Install what it takes: pip install 'amp-convert[onnx]'."
    )


@pytest.mark.slow
def test_an_operator_without_translation_is_named_with_its_layer(tmp_path: Path) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return damped(x)

    mixed = amp.convert(Custom(), torch.randn(2, 3))
    with pytest.raises(UnsupportedModelError) as caught:
        export_onnx(mixed, tmp_path / "m.onnx")
    text = str(caught.value)
    assert text.startswith(
        "this model cannot be written as ONNX: the operator amp_convert_tests.damped has no "
        "translation to ONNX (at inner tests/onnx_file/test_write.py:"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_the_exporter_refuses_is_said_with_its_layer(tmp_path: Path) -> None:
    """PyTorch's exporter takes attention with heads only, in FP32 as well."""

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    mixed = amp.convert(nn.Sequential(Flat()), torch.randn(2, 3, 4))
    with pytest.raises(UnsupportedModelError) as caught:
        export_onnx(mixed, tmp_path / "m.onnx")
    assert "only 4D query, key, and value are supported" in str(caught.value)
    assert "(at 0 tests/onnx_file/test_write.py:" in str(caught.value)


@pytest.mark.slow
def test_a_model_captured_in_parts_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y if y.sum() > 0 else -y

    mixed = amp.convert(Branching(), torch.randn(2, 4))
    with pytest.raises(
        UnsupportedModelError, match="only parts of this one could be captured: its control"
    ):
        export_onnx(mixed, tmp_path / "m.onnx")
