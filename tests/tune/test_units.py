"""What is chosen together, and what lies between."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.attribute.budget import attribute
from amp_convert.tune.results import Border, Cost, Unit
from amp_convert.tune.units import make_units
from amp_convert.validate.inference.results import LayerTime

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Model(nn.Module):
    """Two blocks, and a head behind a view at the top level."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(96, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.flatten(1))


def made(
    cost: Cost = Cost.MODEL, times: tuple[LayerTime, ...] = (), *, blocks: bool = False
) -> tuple[tuple[Unit, ...], tuple[Border, ...]]:
    torch.manual_seed(0)
    mixed = amp.convert(Model().eval(), X, train=False)
    budget = attribute(mixed, (X,), {}, floor=False, casts=True)
    units, borders = make_units(mixed, budget, times, cost, blocks=blocks)
    total = sum(node.rel_l2**2 for node in budget.nodes)
    assert math.isclose(sum(unit.error**2 for unit in units), total)
    return units, borders


def test_products_of_one_value_are_one_choice() -> None:
    units, _ = made()
    names = [unit.name for unit in units]
    assert "blocks.0.q" in names
    assert "blocks.0.k" not in names
    together = next(unit for unit in units if unit.name == "blocks.0.q")
    assert {node.split("/")[0] for node in together.nodes} == {
        "blocks.0.q",
        "blocks.0.k",
        "blocks.0.v",
    }
    assert together.macs == 3 * 4 * 6 * 16 * 16


def test_blocks_are_one_choice_each() -> None:
    units, borders = made(blocks=True)
    assert {unit.name for unit in units} == {"blocks.0", "blocks.1", "head", ""}
    assert {(b.source, b.reader) for b in borders} >= {("blocks.0", ""), ("", "blocks.1")}


def test_prices_are_shares_of_the_products_or_what_was_measured() -> None:
    units, borders = made()
    assert math.isclose(sum(unit.price for unit in units), 1)
    assert all(border.price > 0 for border in borders)
    times = (
        LayerTime("head", "Linear", fp32=3.0, autocast=None, mixed=1.5, frozen=1.0),
        LayerTime("blocks.0.q", "Linear", fp32=1.0, autocast=None, mixed=2.0, frozen=1.5),
        LayerTime("blocks.0.k", "Linear", fp32=4.0, autocast=None, mixed=2.0, frozen=1.0),
    )
    priced = {unit.name: unit.price for unit in made(Cost.MEASURED, times)[0]}
    assert priced["head"] == 2.0
    assert priced["blocks.0.q"] == 2.5  # of q and k together
    assert priced["blocks.1.q"] == 0.0


def test_a_border_reaches_through_what_is_not_chosen() -> None:
    """The head reads the sum at the top level through a view."""
    _, borders = made()
    found = {(border.source, border.reader): border for border in borders}
    assert ("", "head") in found
    assert found["", "head"].error > 0
    assert not any(border.source == border.reader for border in borders)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_cast_adds_is_what_rounding_the_value_does(dtype: torch.dtype) -> None:
    """Of one layer's result, held against rounding it by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    x = torch.randn(64, 16)
    mixed = amp.convert(model, x, dtype=dtype, train=False)
    found = attribute(mixed, (x,), {}, vectors=32, floor=False, casts=True)
    row = next(node for node in found.nodes if node.layer == "1")
    with torch.no_grad():
        value = model[1](model[0](x))
        want, have = model[2](value), model[2](value.to(dtype).float())
    assert row.cast_rel_l2 == pytest.approx(float((have - want).norm() / want.norm()), rel=0.2)
