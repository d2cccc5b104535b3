"""FP32 regions and what they cost, counted against what a converted model dispatches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert.plan.costs import Island

aten = torch.ops.aten


class Middle(nn.Module):
    """Two layers, and operators between them that a rule keeps in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cumsum(torch.tanh(self.first(x)), -1)
        return self.last(y.reshape(-1, 16) * 0.5)


class Casts(TorchDispatchMode):
    """The bytes that casts of activations read and write."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.moved, self._sizes = 0, sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and args[0].numel() in self._sizes:
            self.moved += args[0].nbytes + result.nbytes
        return result


def _rules(tmp_path) -> str:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.toml"
    path.write_text(
        "[[rule]]\nop = 'aten.cumsum'\ncategory = 'deny'\nreason = 'it sums'\n", encoding="utf-8"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 5])
def test_an_island_between_two_layers(tmp_path, rows: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = Middle().eval(), torch.randn(rows, 8)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, rules=["default", _rules(tmp_path)])
    values = rows * 16
    wide = [d.op for d in mixed.plan.eval if d.decided and not d.low]
    assert {d.op for d in mixed.plan.eval if d.low} == {"aten.linear"}
    results = [op for op in wide if op != "aten.reshape"]
    assert mixed.plan.islands == (
        Island(
            layer="",
            op="aten.cumsum",
            reason="it sums",
            evidence=next(d.evidence for d in mixed.plan.eval if d.op == "aten.cumsum"),
            ops=tuple((op, 1) for op in wide),
            nodes=len(wide),
            casts=2,
            cast_bytes=2 * values * (4 + 2),
            wider_bytes=len(results) * values * 2,
        ),
    )
    # What a call casts of this size is what was said. Inputs and outputs have half of it.
    with torch.no_grad(), Casts({values}) as seen:
        mixed.freeze()(x)
    assert seen.moved == 2 * values * (4 + 2)


@pytest.mark.slow
def test_what_costs_nothing_is_none() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * torch.exp(self.scale)

    x = torch.randn(3, 8)
    low = amp.convert(nn.Linear(8, 8).eval(), x, dtype=torch.bfloat16)
    wide = amp.convert(Weights().eval(), x, rules="fp32")
    assert low.plan.islands == wide.plan.islands == ()
