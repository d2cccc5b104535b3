"""Files of odd structure: branches, complex numbers, names, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.onnx_file.write import export_onnx
from amp_convert.validate.onnx import sessions
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.onnx.results import OnnxParity
from amp_convert.verdict.onnx_checks import converted_check, onnx_checks
from amp_convert.verdict.thresholds import Thresholds
from tests.onnx_files import tensor_leaves


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
