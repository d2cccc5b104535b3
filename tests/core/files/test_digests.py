"""Digests against hashlib on bytes written out by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from amp_convert.core.files import digests


def test_a_file_and_a_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ü".encode())
    expected = hashlib.sha256("ü".encode()).hexdigest()
    assert digests.of_file(tmp_path / "a") == digests.of_text("ü") == expected


def test_tensors_by_name_dtype_shape_and_bits() -> None:
    inputs, empty = torch.tensor([[1.0, -2.0], [0.5, float("nan")]]), torch.empty(0)
    found = digests.of_tensors([("x", inputs.T), ("", empty)])
    written = b"x:torch.float32:(2, 2)" + inputs.T.contiguous().numpy().tobytes()
    assert found == hashlib.sha256(written + b":torch.float32:(0,)").hexdigest()
    assert digests.of_tensors([("x", inputs)]) != digests.of_tensors([("x", inputs.reshape(4))])
    assert digests.of_tensors([("x", -empty)]) != digests.of_tensors([("y", empty)])


def test_sparse_and_quantised_tensors_count_by_their_values() -> None:
    eye = torch.eye(3)
    for made in (
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda t: torch.quantize_per_tensor(t, 0.5, 0, torch.qint8),
    ):
        same, twice = (digests.of_tensors([("x", made(t))]) for t in (eye, eye * 2))
        assert same != twice
        assert same == digests.of_tensors([("x", made(eye.clone()))])
