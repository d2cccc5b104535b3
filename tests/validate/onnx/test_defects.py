"""Defects that were put into files are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import UsageError
from amp_convert.onnx_file.write import OnnxModel, export_onnx
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.onnx.sessions import Session
from tests.validate.onnx.blocks import on_a_cpu


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
