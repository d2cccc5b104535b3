"""Ranges of gradients, and the comparison as a whole."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.validate.training.gradient_results import GradientParity
from tests.bits import assert_same_bits
from tests.small_models import example as small
from tests.validate.training.gradient_parity import net, of_zoo, parity, staged
from tests.validate.training.gradient_steps import Branching, Net

SCALE = 2.0**16


# --- ranges --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranges_worked_out_by_hand() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).relu()

    of = staged(Scale(), torch.tensor([[1.0, 2.0, -1.0, 4.0], [0.0, 2.0, 1.0, 1.0]]))
    # With a loss of sum(out · target), the gradient of the output is the target, that of the
    # product is the target where the product is positive, that of the weight its sum over x.
    target = torch.tensor([[1.0, 2.0**-24, 3.0, 2.0**-30], [1.0, 2.0**-15, 0.0, 2.0**-28]])
    found = compare_gradients(
        of.convert("fp32"), of.args, {}, target, lambda out, t: (out * t).sum(), scale=2.0**6
    )
    relu, product = (
        {0: 2, -24: 1, 1: 1, -30: 1, -15: 1, -28: 1},
        {0: 1, -24: 1, -30: 1, -15: 1, -28: 1},
    )
    rows = {row.op: row for row in found.activations}
    assert set(rows) == {"aten.mul.Tensor", "aten.relu.default"}
    assert rows["aten.relu.default"].abs_max == 3
    assert rows["aten.relu.default"].grad_underflow_fraction == 2 / 7
    assert rows["aten.relu.default"].scaled_grad_underflow_fraction == 0
    assert rows["aten.mul.Tensor"].grad_underflow_fraction == 2 / 5
    activations = found.activation_range
    assert dict(activations.histogram.counts) == {
        e: relu[e] + product.get(e, 0) for e in sorted(relu)
    }
    assert (activations.histogram.elements, activations.histogram.zeros) == (16, 4)
    assert activations.underflow_fraction == 4 / 12
    assert activations.subnormal_fraction == 8 / 12
    assert activations.scaled_underflow_fraction == 0
    assert activations.scaled_subnormal_fraction == 6 / 12
    # weight: 1·1; 2·2**-24 + 2·2**-15; 0; 4·2**-30 + 2**-28 = 2**-27
    assert dict(found.weight_range.histogram.counts) == {-27: 1, -14: 1, 0: 1}
    assert found.weight_range.underflow_fraction == 1 / 3
    assert found.recommended.scale == 2.0**13  # 3 · 2 · 2**13 = 49152
    assert found.recommended.lost_without == 5 / 15
    assert found.layers[0].grad_underflow_fraction == 4 / 12


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(-20, 20))
def test_a_factor_of_the_loss_moves_the_histograms(power: int) -> None:
    of = small("block")

    def ranges(factor: float) -> list[Any]:
        found = compare_gradients(
            of.convert("fp32"), of.args, {}, None, lambda out, _: (out**2).sum() * factor
        )
        return [found.weight_range.histogram, found.activation_range.histogram]

    for plain, moved in zip(ranges(1.0), ranges(2.0**power), strict=True):
        assert dict(moved.counts) == {e + power: n for e, n in plain.counts.items()}
        assert plain.zeros + plain.nonfinite + sum(plain.counts.values()) == plain.elements
        assert moved.abs_max == plain.abs_max * 2.0**power


def test_without_any_gradient_there_is_no_scale() -> None:
    found = parity(net().convert(), lambda out, t: (out * 0).sum())
    assert found.recommended.scale is None
    assert found.recommended.reason == "every gradient is zero"
    assert found.total.zeroed_share is None
    assert found.total.rel_l2 == 0
    assert found.weight_range.underflow_fraction is None


def test_a_layers_share_is_that_of_its_nodes() -> None:
    found = of_zoo("gpt2", 1e-3)
    sums: dict[str, list[float]] = {}
    for row in found.activations:
        total = sums.setdefault(row.layer, [0.0, 0.0])
        if row.grad_underflow_fraction is not None:
            total[0] += row.elements
            total[1] += row.elements * row.grad_underflow_fraction
    shares = {row.layer: row.grad_underflow_fraction for row in found.layers}
    assert set(sums) <= set(shares)
    for layer, (elements, lost) in sums.items():
        if elements:  # nearly: elements that are zero do not count
            assert shares[layer] == pytest.approx(lost / elements, abs=0.1), layer


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_parts() -> None:
    torch.manual_seed(0)
    of = staged(Branching())
    found = parity(of.convert(), scale=SCALE)
    assert found.reference_rel_l2 == 0
    assert 0 < found.total.rel_l2 < 0.01
    assert [row.name for row in found.parameters] == [n for n, _ in of.model.named_parameters()]
    assert {row.layer for row in found.activations} == {"first", "middle", "last"}
    assert parity(of.convert("fp32")).total.rel_l2 == 0


@pytest.mark.slow
def test_a_reference_that_is_not_the_model_is_noticed() -> None:
    torch.manual_seed(0)
    of = staged(Net())
    of.model.get_submodule("drop").p = 0.25  # type: ignore[assignment]
    assert parity(of.convert("fp32")).reference_rel_l2 > 0.1


def test_nothing_is_left_behind() -> None:
    of = net()
    mixed = of.convert()
    before = copy.deepcopy(dict(of.model.state_dict()))
    parity(mixed)  # seeds; so the state to compare with is the one after a second seeding
    torch.manual_seed(3)
    state = torch.get_rng_state()
    parity(mixed, scale=SCALE)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits(before, dict(of.model.state_dict()))
    assert all(p.grad is None for p in of.model.parameters())


def test_the_result_is_plain_data() -> None:
    found = parity(net().convert(), scale=SCALE)
    data = json.loads(json.dumps(asdict(found)))
    assert data["scale"] == 65536
    assert data["weight_range"]["histogram"]["elements"] == found.total.elements
    assert found == parity(net().convert(), scale=SCALE)


def test_what_is_wrong_is_said_before_any_mixed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = net().convert()
    monkeypatch.setattr(type(mixed), "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ModelError, match="the FP32 model itself has a loss of nan"):
        parity(mixed, lambda out, t: out.sum() * math.nan, path="/somewhere/model.py")
    with pytest.raises(UsageError, match="a loss scale of 1000 is not a power of two"):
        parity(mixed, scale=1000)


def test_a_loss_that_refuses_what_the_mixed_model_gives() -> None:
    calls = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(out.dtype)
        if len(calls) == 5:
            raise ValueError("not in [0, 1]")
        return F.mse_loss(out, target)

    with pytest.raises(ModelError, match="given the outputs of the mixed model, raised ValueError"):
        parity(net().convert(), loss)
    assert calls == [torch.float32] * 5


@pytest.mark.parametrize(("call", "lacking"), [(3, "rounded_rel_l2"), (4, "noise_rel_l2")])
def test_a_loss_that_refuses_other_weights_costs_that_figure_only(call: int, lacking: str) -> None:
    calls = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(out.dtype)
        if len(calls) == call:
            raise ValueError("not in [0, 1]")
        return F.mse_loss(out, target)

    def without(found: GradientParity) -> GradientParity:
        layers = tuple(replace(layer, **{lacking: None}) for layer in found.layers)
        own = {"rounded_rel_l2": None} if lacking == "rounded_rel_l2" else {}
        return replace(found, layers=layers, **own)

    found, usual = parity(net().convert(), loss), parity(net().convert())
    assert found == without(usual) != usual
