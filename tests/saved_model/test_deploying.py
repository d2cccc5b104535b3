"""What other tools make of the frozen model as it is, and of its archive."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import bits, zoo
from tests.archives import loaded, saved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "bert", "lstm"])
def test_export_and_trace_take_it(name: str, tmp_path: Path) -> None:
    model, args, kwargs = zoo.example(name)
    frozen = zoo.converted(name, "default", torch.bfloat16).freeze()
    assert inspect.signature(frozen.forward) == inspect.signature(model.forward)
    want = bits.tensors(frozen(*args, **kwargs))
    torch.export.save(torch.export.export(frozen, args, kwargs, strict=False), tmp_path / "m.pt2")
    traced = torch.jit.trace(
        frozen,
        example_inputs=args or None,
        example_kwarg_inputs=kwargs or None,
        strict=False,  # it may return a dict
    )
    torch.jit.save(traced, tmp_path / "m.pt")
    for program in (loaded(tmp_path / "m.pt2"), torch.jit.load(tmp_path / "m.pt")):
        with torch.no_grad():
            have = bits.tensors(program(*args, **kwargs))
        for a, b in zip(want, have, strict=True):
            assert float((a - b).norm() / a.norm()) < 4e-3  # half a unit of BF16 is 2e-3


@pytest.mark.slow
def test_aotinductor_compiles_the_archive(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    frozen, _ = saved(nn.Sequential(nn.Linear(8, 16), nn.GELU()), tmp_path / "m.pt2", x)
    program = torch.export.load(tmp_path / "m.pt2")
    package = str(tmp_path / "compiled.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    other = torch.randn(6, 8)
    error = (compiled(other) - frozen(other)).norm() / frozen(other).norm()
    assert float(error) < 1e-3
