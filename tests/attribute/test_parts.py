"""Models that were captured in parts: what lies between is differentiated as eager code is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Doubt
from tests.capture.branching_models import branching

LOW = (torch.float16, torch.bfloat16)
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Eager(nn.Module):
    """A part that is called twice, eager weights before, between and after, and a write in place
    to what a part gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(16, 16) / 4)
        self.part = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = x @ self.before
        if float(x.sum()) > 1e9:  # which cannot be captured
            x = x + 1
        y = self.part(x)
        y += x
        return {"scores": self.head(self.part(y)) * 2, "size": x.abs().sum().item()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
def test_a_model_in_parts_adds_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Eager().eval()
    x = torch.randn(64, 16)
    mixed = amp.convert(model, x, dtype=dtype, rules="half", train=False)
    assert not mixed.captured.is_whole
    flags = [p.requires_grad for p in model.parameters()]
    found = attribute(mixed, (x,), {})
    assert found.doubts == ()
    assert 0.6 < found.additivity < 1.6
    assert {node.layer for node in found.nodes if node.rel_l2} == {
        "part.0",
        "part.1",
        "part.2",
        "head",
    }
    assert found.outputs == ("scores",)
    # Nothing is left behind.
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in model.part.__dict__
    assert attribute(mixed, (x,), {}) == found


@pytest.mark.slow
def test_each_part_adds_what_it_adds_alone() -> None:
    """Held against rounding one part's layers by hand."""
    torch.manual_seed(0)
    model = Eager().eval()
    x = torch.randn(64, 16)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, rules="half", train=False)
    found = attribute(mixed, (x,), {}, vectors=32)
    head = next(node for node in found.nodes if node.layer == "head")
    with torch.no_grad():
        want = model(x)["scores"]
        y = model.part(x @ model.before) + x @ model.before
        read = model.part(y).bfloat16()  # as a low part hands it on
        exact = nn.functional.linear(read.float(), model.head.weight, model.head.bias)
        low = nn.functional.linear(read, model.head.weight.bfloat16(), model.head.bias.bfloat16())
    error = float((low.float() - exact).norm() * 2 / want.norm())
    assert math.isclose(head.rel_l2, error, rel_tol=0.35)


@pytest.mark.slow
def test_what_cannot_be_differentiated_is_tried() -> None:
    model = branching()
    mixed = amp.convert(model, X, rules="half", train=False)
    found = attribute(mixed, (X,), {})
    assert found.nodes
    assert Doubt.NONFINITE not in found.doubts
    assert found.measured_rel_l2 > 0
