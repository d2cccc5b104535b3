"""ONNX Runtime: tensors in and out, files that it cannot open, and what runs in which precision."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import parser

from amp_convert.core.errors import UsageError
from amp_convert.validate.onnx import sessions as onnx_sessions
from amp_convert.validate.onnx.sessions import (
    Placement,
    Session,
    failing_optimisation,
    recorded,
    why_not,
)
from tests.bits import same_bits

on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with CUDA, other nodes run as they are written"
)


def write(path: Path, text: str) -> str:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> main {text}')
    for node in proto.graph.node:
        node.name = f"{node.op_type} of {node.output[0]}"
    onnx.save(proto, path)
    return str(path)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str
)
def test_tensors_go_in_and_out_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float",
             torch.int64: "int64", torch.bool: "bool"}  # fmt: skip
    name = names[dtype]
    path = write(tmp_path / "m.onnx", f"({name}[2,3] x) => ({name}[3,2] y) {{ y = Transpose(x) }}")
    x = torch.tensor([[1, 0, 3], [4, 5, 0]]).to(dtype)
    (y,) = Session(path).run([x])
    assert same_bits(y, x.T.contiguous())


@on_a_cpu
def test_what_runs_in_which_precision(tmp_path: Path) -> None:
    """The CPU has no kernels for FP16 arithmetic, moves FP16 as it is, and has no GELU in FP16,
    which it makes of several operators."""
    text = """(float16[2,2] x) => (float16[2,2] y, float[2,2] z) {
        a = Transpose(x)
        b = MatMul(a, x)
        y = Gelu(b)
        c = Cast<to=1>(x)
        z = Neg(c)
    }"""
    session, placements = recorded(write(tmp_path / "m.onnx", text))
    assert session.providers == ("CPUExecutionProvider",)
    assert placements == {
        "Transpose of a": Placement("as written", "CPUExecutionProvider"),
        "MatMul of b": Placement("in float32", "CPUExecutionProvider"),
        "Gelu of y": Placement("rewritten", "CPUExecutionProvider"),
        "Cast of c": Placement("as written", "CPUExecutionProvider"),
        "Neg of z": Placement("as written", "CPUExecutionProvider"),
    }


@on_a_cpu
def test_a_session_hides_an_overflow(tmp_path: Path) -> None:
    """Which is why there is a run node by node: this pins what it is there for."""
    text = """(float16[1] x, float16[1] up, float16[1] down) => (float16[1] y) {
        a = Mul(x, up)
        y = Mul(a, down)
    }"""
    path = write(tmp_path / "m.onnx", text)
    x, up, down = (torch.tensor([v]).half() for v in (100.0, 1024.0, 1 / 1024))
    assert torch.isinf(x * up * down).all()
    for optimised in (False, True):
        (y,) = Session(path, optimised=optimised).run([x, up, down])
        assert y.item() == 100.0


def test_a_file_that_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "(float[1] x) => (float[1] y) { y = Neg(x) }")
    assert why_not(path) == ""
    assert failing_optimisation(path) == ("", ())


def test_a_file_that_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"nothing of the kind")
    failure, without = failing_optimisation(str(path))
    assert "m.onnx" in failure
    assert without == ()


def test_a_crash_is_no_crash_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = (
        f"import os, sys\nif sys.argv[3] != {onnx_sessions.SUSPECTS[1]!r}: os.kill(os.getpid(), 11)"
    )
    monkeypatch.setattr(onnx_sessions, "_PROBE", dies)
    failure, without = failing_optimisation(str(tmp_path / "m.onnx"))
    assert failure == "ONNX Runtime crashed while it opened it (signal 11)"
    assert without == (onnx_sessions.SUSPECTS[1],)


def test_a_file_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_sessions, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(onnx_sessions, "_TIMEOUT", 0.5)
    assert why_not(str(tmp_path / "m.onnx")) == "ONNX Runtime did not open it within 0 s"


def test_without_onnx_runtime_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "amp_convert.core.optional_packages.find_spec", lambda name: name != "onnxruntime" or None
    )
    with pytest.raises(UsageError) as caught:
        onnx_sessions.runtime_version()
    assert str(caught.value) == (
        "onnxruntime is not installed. Install what it takes: pip install 'amp-convert[onnx]'."
    )
