"""ONNX files on disk, and what cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.onnx_file import write as onnx_export
from amp_convert.onnx_file.write import export_onnx
from tests.graph_operations import damped
from tests.onnx_file.perceptron import perceptron
from tests.onnx_files import (
    run,
)

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
        "translation to ONNX (at inner tests/onnx_file/test_written_files.py:"
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
    assert "(at 0 tests/onnx_file/test_written_files.py:" in str(caught.value)


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
