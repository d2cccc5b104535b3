"""Exported files run beside PyTorch: agreement, and defects that were put there to be found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UsageError
from amp_convert.core.number_formats import ulp_at
from amp_convert.onnx_file.write import OnnxModel, export_onnx
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.onnx import sessions
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.onnx.results import OnnxParity
from amp_convert.validate.onnx.sessions import Session
from amp_convert.verdict.onnx_checks import converted_check, onnx_checks
from amp_convert.verdict.thresholds import Thresholds
from tests.onnx_files import every_exportable, exportable, exported, fp32_twin, run, tensor_leaves
from tests.zoo import converted, example

on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with CUDA, ONNX Runtime has kernels for FP16 and BF16"
)


def parity_of(name: str, dtype: torch.dtype) -> OnnxParity:
    _, args, kwargs = example(name)
    return validate_onnx(
        converted(name, "default", dtype),
        exported(name, dtype),
        [(args, kwargs, None)],
        fp32=partial(fp32_twin, name, dtype),
    )


class Block(nn.Module):
    """What a transformer's block is made of, small."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.gelu(self.up(self.norm(x)))
        y = x + self.down(hidden)
        return {"y": y, "largest": y.argmax(-1)}


@pytest.fixture
def block(tmp_path: Path) -> tuple[ConvertedModel, OnnxModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    mixed = amp.convert(Block().eval(), x)
    return mixed, export_onnx(mixed, tmp_path / "block.onnx"), x


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


# --- defects that were put there -----------------------------------------------------------------


def spoil(file: OnnxModel, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(file.path)
    change(proto)
    onnx.save(proto, file.path)


@pytest.mark.slow
def test_a_wrong_weight_is_found_where_it_is(block: Any) -> None:
    mixed, file, x = block

    def change(proto: onnx.ModelProto) -> None:
        (bias,) = (t for t in proto.graph.initializer if t.name == "down.bias")
        array = numpy_helper.to_array(bias).copy()
        array[5] += np.float16(0.25)
        bias.CopyFrom(numpy_helper.from_array(array, bias.name))

    spoil(file, change)
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    assert parity.parting == parity.drifting == "down/aten.linear#0"
    assert [row.node for row in parity.nodes if row.parts] == ["down/aten.linear#0"]
    for arm in ("unoptimised", "optimised", "node by node"):
        assert parity.run(arm).agrees is False
        error = parity.run(arm).outputs[0].against_converted
        assert error is not None
        assert error.max_abs_err == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_a_wrong_operator_is_found_where_it_is(block: Any) -> None:
    mixed, file, x = block

    def change(proto: onnx.ModelProto) -> None:
        (gelu,) = (node for node in proto.graph.node if node.op_type == "Gelu")
        gelu.attribute.clear()
        gelu.op_type = "Relu"

    spoil(file, change)
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    assert [row.node for row in parity.nodes if row.parts] == ["/aten.gelu#0"]
    later = [row for row in parity.nodes if row.node != "/aten.gelu#0"]
    assert all(row.local_rel_l2 is not None and row.local_rel_l2 < 1e-3 for row in later)


class Scaled(nn.Module):
    """Its sum is 153600, which FP16 does not have; a thousandth of that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 1, bias=False)
        nn.init.constant_(self.linear.weight, 240.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / 1024


@pytest.mark.slow
@on_a_cpu
def test_an_overflow_that_sessions_hide_is_there_node_by_node(tmp_path: Path) -> None:
    x = torch.full((2, 64), 10.0)
    mixed = amp.convert(Scaled().eval(), x, rules="half")
    with torch.no_grad():
        assert torch.isinf(mixed.eval()(x)).all()
    file = export_onnx(mixed, tmp_path / "m.onnx")
    parity = validate_onnx(mixed, file, [((x,), {}, None)])
    for arm in ("unoptimised", "optimised"):
        (output,) = parity.run(arm).outputs
        assert output.against_fp32.nonfinite == 0, "ONNX Runtime keeps FP32 between the two"
        assert output.agrees is False
    (output,) = parity.run("node by node").outputs
    assert output.against_fp32.nonfinite == 2
    assert output.agrees is True
    assert parity.unrounded == "linear/aten.linear#0"


@pytest.mark.slow
def test_a_run_that_fails_later_judges_nothing(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, file, x = block
    works = Session.run

    def fails_for_three(self: Session, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if len(inputs[0]) == 3:
            raise RuntimeError("it does not take\nthree")
        return works(self, inputs)

    monkeypatch.setattr(Session, "run", fails_for_three)
    batches = [((x,), {}, None), ((x[:3],), {}, None)]
    parity = validate_onnx(mixed, file, batches, score=lambda outputs, _: {"m": 1.0})
    assert (parity.metrics, parity.metrics_arm) == ((), None), "one batch of two is no mean"
    for arm in ("fp32", "unoptimised", "optimised"):
        each = parity.run(arm)
        assert (each.failure, each.outputs, each.agrees) == ("three", (), None)
    assert [output.agrees for output in parity.run("node by node").outputs] == [None, True]


@pytest.mark.slow
def test_without_onnx_runtime_it_is_said_what_to_install(
    block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, file, x = block
    monkeypatch.setattr(
        "amp_convert.core.optional_packages.find_spec", lambda name: name != "onnxruntime" or None
    )
    with pytest.raises(UsageError, match=r"pip install 'amp-convert\[onnx\]'"):
        validate_onnx(mixed, file, [((x,), {}, None)])


# --- structures ----------------------------------------------------------------------------------


def check(model: nn.Module, tmp_path: Path, *inputs: Any) -> OnnxParity:
    torch.manual_seed(0)
    mixed = amp.convert(model.eval(), inputs)
    file = export_onnx(mixed, tmp_path / "m.onnx")
    parity = validate_onnx(mixed, file, [(inputs, {}, None)])
    assert [each.failure for each in parity.runs] == [""] * 4
    assert parity.run("node by node").agrees is True
    return parity


@pytest.mark.slow
def test_branches_in_the_graph(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return torch.cond(y.sum() > 0, lambda a: torch.relu(a) * 2, lambda a: -a, (y,))

    check(Branching(), tmp_path, torch.randn(2, 4))


@pytest.mark.slow
def test_what_is_left_after_cancelling_does_not_part(tmp_path: Path) -> None:
    """The mean of a normalised row is zero but for rounding, of which nothing needs to agree."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = F.layer_norm(self.linear(x).float(), (32,))
            return y, y.mean(-1)

    torch.manual_seed(0)
    x = torch.randn(64, 32)
    mixed = amp.convert(Centred().eval(), x)
    parity = validate_onnx(mixed, export_onnx(mixed, tmp_path / "m.onnx"), [((x,), {}, None)])
    mean = next(row for row in parity.nodes if row.op == "aten.mean")
    assert mean.local_rel_l2 is not None
    assert mean.local_rel_l2 > 0.01
    assert not mean.parts
    assert parity.parting == ""


@pytest.mark.slow
def test_complex_numbers_on_the_way(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(self.linear(x), dim=-1).abs()

    check(Spectrum(), tmp_path, torch.randn(2, 8))


@pytest.mark.slow
def test_tuples_and_values_that_are_passed_on(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 12)
            self.norm = nn.BatchNorm1d(12)

        def forward(self, x: torch.Tensor, flag: bool) -> Any:
            y = self.norm(self.linear(x))
            a, b, c = y.float().clone().chunk(3, -1)
            values, indices = (a * b).topk(2, -1)
            return values, (indices, c.detach()), {"again": c}

    parity = check(Parts(), tmp_path, torch.randn(6, 8), True)
    found = {row.node: row.onnx_ops for row in parity.nodes}
    assert found["norm/operator.getitem#0"] == ()
    assert set(found) >= {f"/operator.getitem#{i}" for i in range(4)}
    assert found["/operator.getitem#0"] == ("Split",)
    assert parity.unmatched == ()


@pytest.mark.slow
def test_names_of_outputs_are_those_of_the_comparison(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = F.linear(x, torch.ones(4, 4))
            return {"x": x, "more": [y, {"inner": y * 2}]}

    parity = check(Named(), tmp_path, torch.randn(2, 4))
    names = [output.against_fp32.name for output in parity.run("unoptimised").outputs]
    assert names == list(tensor_leaves(Named()(torch.randn(2, 4))))


class Noise(nn.Module):
    """A linear layer whose result is thinned out at random, in eval mode, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.kind == "dropout":
            return F.dropout(y, 0.5, training=True)
        return y * (torch.rand_like(x) > 0.5) if self.kind == "rand" else y + torch.randn_like(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rand", "randn", "dropout"])
def test_random_numbers_are_those_of_nobody_else(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    mixed = amp.convert(Noise(kind).eval(), x)
    parity = validate_onnx(mixed, export_onnx(mixed, tmp_path / "m.onnx"), [((x,), {}, None)])
    assert kind in parity.drawing
    checks = onnx_checks(parity, "", Thresholds.for_dtype("float16"))
    assert {c.status for c in checks if c.name != "onnx.runs"} == {"unchecked"}
    # Nor does an FP32 file that is far from PyTorch give a limit that lets anything pass.
    assert [each.agrees for each in parity.runs] == [None] * 4


@pytest.mark.slow
def test_what_the_optimiser_spoils_does_not_pass(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 gets a transposed matrix times a vector wrong once it is optimised, in FP32
    and in FP16."""

    class Sinkhorn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            v = torch.ones_like(x[0])
            for _ in range(3):
                v = 1 / (x.t() @ (1 / (x @ v)))
            return x * v

    x = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) + 0.1
    mixed = amp.convert(Sinkhorn().eval(), x)
    parity = validate_onnx(mixed, export_onnx(mixed, tmp_path / "m.onnx"), [((x,), {}, None)])
    assert parity.run("unoptimised").outputs[0].against_fp32.rel_l2 < 1e-2
    if parity.run("optimised").outputs[0].against_fp32.rel_l2 > 1e-2:
        check = converted_check(parity)
        assert check.status == "fail"
        assert "an optimisation of ONNX Runtime changes the result" in check.reason


@pytest.mark.slow
def test_a_kernel_that_only_an_optimisation_asks_for_says_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : SimplifiedLayerNormalization(1)"
    found = (said, (sessions.SUSPECTS[1],))
    monkeypatch.setattr(sessions, "failing_optimisation", lambda path: found)
    x = torch.randn(3, 4)
    mixed = amp.convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval(), x)
    parity = validate_onnx(mixed, export_onnx(mixed, tmp_path / "m.onnx"), [((x,), {}, None)])
    optimised = parity.run("optimised")
    assert (optimised.failure, optimised.batches, optimised.lacks_kernel) == (said, 1, True)
    checks = {
        c.name: c
        for c in onnx_checks(parity, "", Thresholds.for_dtype("float16"), metrics_supplied=False)
    }
    assert checks["onnx.runs"].status == "unchecked"
