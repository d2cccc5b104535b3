"""The two graphs side by side: what is fed to what, and how much is kept."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.frozen_model import fold_weights
from amp_convert.validate.onnx import lockstep as onnx_lockstep
from amp_convert.validate.onnx.lockstep import OnnxLockstep, OnnxNodeValues

Visited = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def visit(mixed: ConvertedModel, path: Path, x: torch.Tensor) -> tuple[Visited, torch.Tensor]:
    """What each FX node showed, and the output."""
    region = mixed.captured.regions[0]
    folded = fold_weights(region, mixed.rewritten[""]["eval"])
    flat = [x if spec.source == "user" else folded.tensors[spec.target]
            for spec in folded.signature.inputs]  # fmt: skip
    seen: Visited = {}

    def record(step: OnnxNodeValues) -> None:
        seen[step.name] = step.reference, step.accumulated, step.local

    with torch.no_grad():
        (output,) = OnnxLockstep(ir.load(path), folded.graph_module).run(flat, [x], record)
    return seen, output


def chain(depth: int, tmp_path: Path) -> tuple[ConvertedModel, Path, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(16, 16), nn.Tanh())))
    x = torch.randn(4, 16)
    mixed = amp.convert(model.eval(), x)
    amp.export_onnx(mixed, tmp_path / "m.onnx")
    return mixed, tmp_path / "m.onnx", x


@pytest.mark.slow
def test_results_have_the_dtypes_and_values_of_pytorch(tmp_path: Path) -> None:
    mixed, path, x = chain(2, tmp_path)
    seen, output = visit(mixed, path, x)
    with torch.no_grad():
        want = mixed.eval()(x)
    names = [name for name in seen if not name.startswith("_to_copy")]
    assert names == ["linear", "tanh", "linear_1", "tanh_1"]
    for reference, accumulated, local in seen.values():
        assert local is not None
        assert reference.dtype == accumulated.dtype == local.dtype
        torch.testing.assert_close(accumulated, reference, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(output, want, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_an_error_accumulates_and_is_local_to_one_node(tmp_path: Path) -> None:
    """The first layer's bias is off by 1 in the file: tanh gets linear + 1, but locally linear."""
    mixed, path, x = chain(2, tmp_path)
    model = ir.load(path)
    bias = model.graph.initializers["0.bias"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="0.bias")
    ir.save(model, path)
    seen, _ = visit(mixed, path, x)
    reference, accumulated, local = seen["linear"]
    assert local is not None
    torch.testing.assert_close(local - reference, torch.ones_like(local), rtol=0, atol=4e-3)
    assert torch.equal(local, accumulated)
    reference, accumulated, local = seen["tanh"]
    assert local is not None
    assert torch.equal(accumulated, torch.tanh(seen["linear"][1]))
    torch.testing.assert_close(local, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_values_are_dropped_after_their_last_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of 20 layers, of which no more than a few values are there at a time."""
    mixed, path, x = chain(20, tmp_path)
    kept: list[int] = []
    free = onnx_lockstep._Values.free

    def counted(self: onnx_lockstep._Values, seen: ir.Value | None) -> None:
        free(self, seen)
        kept.append(len(self._values))

    monkeypatch.setattr(onnx_lockstep._Values, "free", counted)
    visit(mixed, path, x)
    assert len(kept) > 40
    assert max(kept) <= 3
