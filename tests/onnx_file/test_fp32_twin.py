"""The FP32 twin against the FP32 model's own export: the same bits in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.onnx_file import build as onnx_program
from amp_convert.onnx_file import fp32_twin as onnx_twin
from amp_convert.onnx_file.fp32_twin import has_twin
from amp_convert.onnx_file.ports import example_tensors
from amp_convert.onnx_file.write import IoTypes, export, write
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.onnx.node_kernels import is_low
from amp_convert.validate.onnx.sessions import Session
from tests.onnx_files import exportable, exported, fp32_twin
from tests.plan.rescaled import attention, convolutions, feed_forward
from tests.staged import Staged, unprobed
from tests.zoo import converted


def results(model: ir.Model, mixed: ConvertedModel, folder: Path) -> list[torch.Tensor]:
    """What ONNX Runtime makes of the example inputs, unoptimised. ONNX's checker has its say."""
    write(model, folder / "m.onnx")
    return Session(str(folder / "m.onnx")).run(example_tensors(mixed.captured.regions[0]))


def low_values(model: ir.Model) -> list[ir.Value]:
    made = [value for node in model.graph for value in node.outputs]
    return [
        v for v in (*model.graph.inputs, *model.graph.initializers.values(), *made) if is_low(v)
    ]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def has_twin_of(mixed: ConvertedModel) -> bool:
    return has_twin(mixed.captured.regions[0], mixed.rewritten[""]["eval"])


@pytest.mark.slow
@exportable("t5")
def test_a_model_with_clamped_masks_has_none(name: str) -> None:
    assert not has_twin_of(converted(name))


# One of each kind of graph: exporting both ways takes long.
@pytest.mark.slow
@exportable("cnn", "lstm", "transformer", "bert", "gpt2", "llama", "vit")
def test_a_twin_computes_what_the_fp32_export_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, by the same operators, but for a weight that is transposed ahead of time."""
    with monkeypatch.context() as patch:
        patch.setattr(onnx_program, "fp32_model", None)  # nothing falls back on it
        mixed, twin = converted(name), fp32_twin(name)
    assert has_twin_of(mixed)
    own = onnx_program.fp32_model(mixed.captured.regions[0], exported(name).opset)
    check_twin(twin, own, mixed, tmp_path)


@pytest.mark.slow
def test_so_does_a_twin_of_a_bf16_model(tmp_path: Path) -> None:
    mixed, twin = converted("cnn", dtype=torch.bfloat16), fp32_twin("cnn", torch.bfloat16)
    check_twin(twin, onnx_program.fp32_model(mixed.captured.regions[0], 22), mixed, tmp_path)


def check_twin(twin: ir.Model, own: ir.Model, mixed: ConvertedModel, folder: Path) -> None:
    assert low_values(twin) == []
    pairs = zip(results(twin, mixed, folder), results(own, mixed, folder), strict=True)
    for have, want in pairs:
        assert have.dtype == want.dtype
        assert torch.equal(have, want)
    moved = Counter({"Transpose": 1})
    assert operators(twin) - moved <= operators(own)
    assert operators(own) - moved <= operators(twin)


@pytest.mark.slow
@pytest.mark.parametrize("build", [attention, feed_forward, convolutions])
def test_powers_of_two_change_no_bit(build: Callable[[], Staged], tmp_path: Path) -> None:
    mixed = build().convert()
    factors = {(d.scale, *(i.scale for i in d.inputs), d.number_scale) for d in mixed.plan.eval}
    assert any(set(each) != {1.0} for each in factors)
    made = export(mixed, tmp_path / "low.onnx")
    assert has_twin_of(mixed)
    own = onnx_program.fp32_model(mixed.captured.regions[0], made.file.opset)
    have, want = (results(model, mixed, tmp_path)[0] for model in (made.fp32(), own))
    assert torch.equal(have, want)


class Masked(nn.Module):
    """In FP32 a row that is masked as a whole forgets its scores; not when the mask is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 4
        return torch.softmax(scores + (1 - mask[:, None]) * -1e9, -1) @ x


@pytest.mark.slow
def test_a_clamped_mask_has_no_twin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 16) * 8, torch.ones(2, 5)
    mask[0, 2:] = 0
    mixed = amp.convert(Masked().eval(), (x, mask), rules=unprobed())
    assert any(decision.clamp is not None for decision in mixed.plan.eval)
    assert not has_twin_of(mixed)
    write(export(mixed, tmp_path / "low.onnx").fp32(), tmp_path / "m.onnx")
    mask[0] = 0
    with torch.no_grad():
        want = mixed.captured.model(x, mask)
    have = Session(str(tmp_path / "m.onnx")).run([x, mask])[0]
    assert torch.allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("io_types", ["keep", "low"])
def test_a_twin_has_fp32_borders(io_types: IoTypes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    mixed = amp.convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval(), x)
    twin = export(mixed, tmp_path / "low.onnx", io_types).fp32()
    borders = [*twin.graph.inputs, *twin.graph.outputs]
    assert {value.dtype for value in borders} == {ir.DataType.FLOAT}
    with torch.no_grad():
        want = mixed.captured.model(x)
    assert torch.allclose(results(twin, mixed, tmp_path)[0], want, rtol=1e-5, atol=1e-6)


class Halved(nn.Module):
    """Rounds to FP16 itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3).half().float() + x


class HalvedInABranch(nn.Module):
    """Does so only where `torch.cond` says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cond(
            x.sum() > 0, lambda y: (y * 3).half().float(), lambda y: y * 3, (x,)
        )
        return found + x


@pytest.mark.slow
@pytest.mark.parametrize("build", [Halved, HalvedInABranch])
def test_a_model_with_low_values_of_its_own_has_no_twin(
    build: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    mixed = amp.convert(build().eval(), x)
    assert not has_twin_of(mixed)
    write(export(mixed, tmp_path / "low.onnx").fp32(), tmp_path / "m.onnx")
    with torch.no_grad():
        want = mixed.captured.model(x)
    assert torch.equal(Session(str(tmp_path / "m.onnx")).run([x])[0], want)


@pytest.mark.slow
def test_where_the_exporter_refuses_it_the_original_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = converted("cnn")
    made = export(mixed, tmp_path / "low.onnx")
    want = results(onnx_program.fp32_model(mixed.captured.regions[0], 20), mixed, tmp_path)[0]

    def spoilt(program: object, _: object) -> object:
        return monkeypatch.undo()  # None is no program; what comes after is exported as ever

    monkeypatch.setattr(onnx_twin, "widen", spoilt)
    assert torch.equal(results(made.fp32(), mixed, tmp_path)[0], want)


@pytest.mark.slow
def test_a_twin_can_be_made_twice(tmp_path: Path) -> None:
    mixed = converted("cnn")
    exported = export(mixed, tmp_path / "low.onnx")
    first, second = (results(exported.fp32(), mixed, tmp_path)[0] for _ in range(2))
    assert torch.equal(first, second)
