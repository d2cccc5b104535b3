"""ONNX files: the plan's precision in every node, and names, sizes and weights as in the model."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from onnx import TensorProto

from amp_convert.onnx_file.write import OnnxTensor
from amp_convert.report.records import NodeRecord
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
