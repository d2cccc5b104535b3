"""Exported files run beside PyTorch: agreement, and defects that were put there to be found."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict

import amp_convert as amp
from amp_convert.core.number_formats import ulp_at
from amp_convert.onnx_file.write import OnnxModel, export_onnx
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.onnx.results import OnnxParity
from tests.onnx_files import every_exportable, exportable, exported, fp32_twin, run
from tests.validate.onnx.blocks import Block, on_a_cpu
from tests.zoo import converted, example


def parity_of(name: str, dtype: torch.dtype) -> OnnxParity:
    _, args, kwargs = example(name)
    return validate_onnx(
        converted(name, "default", dtype),
        exported(name, dtype),
        [(args, kwargs, None)],
        fp32=partial(fp32_twin, name, dtype),
    )


# --- every model ---------------------------------------------------------------------------------


@pytest.mark.slow
@every_exportable
def test_fp16_files_agree_or_it_is_said_where_they_part(name: str) -> None:
    """The FP32 files agree with PyTorch to rounding; FP16 files within a few ULP, and where that is
    more than one, a node is named. No node on its own is further off than two roundings."""
    parity = parity_of(name, torch.float16)
    fp32 = parity.run("fp32")
    assert fp32.failure == ""
    for output in fp32.outputs:
        row = output.against_fp32
        assert (row.nonfinite, row.mismatches) == (0, 0)
        assert row.max_abs_err <= 1e-5 * row.ref_abs_max, row.name
    for each in parity.runs[1:]:
        assert each.outputs, each.failure
        assert each.failure == "" or each.without
        assert each.batches == 1
        for output in each.outputs:
            if output.limit is not None:
                assert output.against_converted is not None
                assert output.against_converted.max_abs_err <= 3 * output.limit
        assert each.agrees or parity.parting or parity.drifting or parity.unrounded
    for row in parity.nodes:
        assert row.nonfinite == 0
        assert row.local_rel_l2 is not None
        assert row.local_rel_l2 < 2 * 2.0**-11, row.node
    assert sum(row.parts for row in parity.nodes) <= 1


@pytest.mark.slow
@exportable("cnn", "lstm", "bert", "gpt2")
@on_a_cpu
def test_bf16_files_are_run_node_by_node_where_there_are_no_kernels(name: str) -> None:
    parity = parity_of(name, torch.bfloat16)
    for arm in ("unoptimised", "optimised"):
        each = parity.run(arm)
        assert "NOT_IMPLEMENTED" in each.failure
        assert (each.outputs, each.agrees) == ((), None)
    assert parity.run("node by node").agrees is True
    assert parity.parting == ""
    assert parity.ran == {}
    assert parity.nodes


# --- what is measured ----------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_are_those_of_all_batches(block: Any) -> None:
    """Against ONNX Runtime called directly, and errors by their definition."""
    mixed, file, x = block
    batches = [x, torch.randn(3, 32)]
    parity = validate_onnx(mixed, file, [((b,), {}, None) for b in batches])
    assert (parity.batches, parity.samples, parity.node_batches) == (2, 9, 1)
    have = torch.cat([run(file, b)[0] for b in batches]).double()
    with torch.no_grad():
        low = torch.cat([mixed.eval()(b)["y"] for b in batches]).double()
        fp32 = torch.cat([mixed.captured.model(b)["y"] for b in batches]).double()
    output = next(o for o in parity.run("unoptimised").outputs if o.against_fp32.name == "y")
    for row, want in ((output.against_fp32, fp32), (output.against_converted, low)):
        assert row is not None
        assert row.elements == 9 * 32
        assert row.max_abs_err == pytest.approx(float((have - want).abs().max()), rel=1e-12)
        assert row.rel_l2 == pytest.approx(float((have - want).norm() / want.norm()), rel=1e-9)
    reference = parity.run("fp32").outputs[0].against_fp32
    ulp = ulp_at(torch.float16, float(fp32.abs().max()))
    assert output.limit == pytest.approx(4 * reference.max_abs_err + ulp, rel=1e-12)
    assert output.agrees is True
    assert [o.agrees for o in parity.run("unoptimised").outputs] == [True, True]
    assert parity.run("node by node").batches == 1


@pytest.mark.slow
def test_rows_are_those_of_the_plan(block: Any) -> None:
    mixed, file, x = block
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    plan = {d.node: d for d in mixed.plan.eval}
    assert [(r.node, r.layer, r.op, r.dtype, r.onnx_ops) for r in parity.nodes] == [
        ("norm/aten.layer_norm#0", "norm", "aten.layer_norm", "float32", ("LayerNormalization",)),
        ("up/aten.linear#0", "up", "aten.linear", "float16", ("Gemm",)),
        ("/aten.gelu#0", "", "aten.gelu", "float16", ("Gelu",)),
        ("down/aten.linear#0", "down", "aten.linear", "float16", ("Gemm",)),
        ("/aten.add#0", "", "aten.add", "float32", ("Add",)),
    ]
    assert all(row.dtype == plan[row.node].dtype for row in parity.nodes)
    assert parity.unmatched == ()
    frame = parity.to_frame()
    assert list(frame.columns) == [f.name for f in dataclasses.fields(parity.nodes[0])]
    assert list(frame.node) == [row.node for row in parity.nodes]


@pytest.mark.slow
@on_a_cpu
def test_how_nodes_run_is_counted(block: Any) -> None:
    mixed, file, x = block
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    assert parity.providers == ("CPUExecutionProvider",)
    assert {row.node: row.ran for row in parity.nodes} == {
        "norm/aten.layer_norm#0": "",
        "up/aten.linear#0": "in float32",
        "/aten.gelu#0": "rewritten",
        "down/aten.linear#0": "in float32",
        "/aten.add#0": "",
    }
    assert parity.ran == {"in float32": 2, "rewritten": 1}
    assert parity.unrounded == "up/aten.linear#0"


@pytest.mark.slow
def test_metrics_are_weighted_by_batch_size(block: Any) -> None:
    mixed, file, x = block

    def score(outputs: dict[str, torch.Tensor], target: float) -> dict[str, float]:
        assert {name: t.dtype for name, t in outputs.items()} == {
            "y": torch.float32, "largest": torch.int64,
        }  # fmt: skip
        return {"mean": float(outputs["y"].mean()), "given": target}

    batches = [((x,), {}, 1.0), ((x[:2],), {}, 5.0)]
    parity = validate_onnx(mixed, file, batches, score=score, lower_is_better=frozenset({"given"}))
    assert parity.metrics_arm == "optimised"
    mean, given = parity.metrics
    assert (given.name, given.fp32, given.converted, given.onnx) == ("given", 2.0, 2.0, 2.0)
    assert (given.lower_is_better, mean.lower_is_better) == (True, False)
    with torch.no_grad():
        outputs = [mixed.captured.model(b)["y"].mean() for b in (x, x[:2])]
    assert mean.fp32 == pytest.approx(float(6 * outputs[0] + 2 * outputs[1]) / 8, abs=1e-7)
    assert mean.onnx == pytest.approx(mean.fp32, abs=1e-3)


@pytest.mark.slow
def test_low_borders_are_validated_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    mixed = amp.convert(Block().eval(), x)
    file = export_onnx(mixed, tmp_path / "low.onnx", io_types="low")
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    output = parity.run("node by node").outputs[0]
    assert output.agrees is True
    # The input is rounded before the sum with it, which PyTorch does with the FP32 input.
    assert output.against_fp32.max_abs_err > 0


class Section(BaseModel):
    """As a report embeds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    model: OnnxModel
    parity: OnnxParity


@pytest.mark.slow
def test_a_report_can_embed_it(block: Any) -> None:
    mixed, file, x = block
    section = Section(model=file, parity=validate_onnx(mixed, file, [((x,), {}, None)]))
    again = Section.model_validate_json(section.model_dump_json())
    assert repr(again) == repr(section)  # NaN, a quantile of integers, is not itself


@pytest.mark.slow
def test_the_model_is_left_as_it_is(block: Any) -> None:
    mixed, file, x = block
    mixed.train()
    before = {key: tensor.clone() for key, tensor in mixed.state_dict().items()}
    given, seen = x.clone(), []
    validate_onnx(mixed, file, [((x,), {}, None)] * 2, on_batch=lambda: seen.append(1))
    assert mixed.training
    assert len(seen) == 2
    assert torch.equal(x, given)
    assert all(torch.equal(tensor, mixed.state_dict()[key]) for key, tensor in before.items())
