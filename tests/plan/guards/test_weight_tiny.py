"""Weights so small that FP16 loses their digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.plan.guards import Operand
from amp_convert.plan.guards.weight_range import WeightTiny
from amp_convert.profile.growth import Growth
from tests.plan.guards.helpers import (
    NAN,
    above,
    activation,
    all_low,
    chain,
    diagonal,
    error,
    fires,
    guarded,
    said,
    site,
    spread,
    weight,
)
from tests.staged import BF16, F16, Staged, rows, rules_with, table

GUARD = WeightTiny()


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "limit", "dtype", "expected"),
    [
        (0.5, 0.5, F16, False),
        (above(0.5), 0.5, F16, True),
        (1.0, 0.5, F16, True),
        (1.0, 1.0, F16, False),
        (0.1, 0.05, F16, True),
        (NAN, 0.5, F16, True),
        (None, 0.5, F16, False),
        (1.0, 0.5, BF16, False),  # BF16 has FP32's exponents
        (1.0, False, F16, False),
    ],
)
def test_most_of_a_weight_keeps_its_digits(
    share: float | None, limit: float, dtype: torch.dtype, expected: bool
) -> None:
    at = site("linear", operands=(weight(1.0), weight(1e-5, share)))
    assert fires(GUARD, at, dtype, weight_tiny_share=limit) == expected


def test_the_finding_names_the_weight_and_its_share() -> None:
    assert said(GUARD, site("linear", operands=(weight(1e-5, 0.9456),))) == (
        "weight-tiny",
        "most of weight encoder.weight is under 6.1e-05, where float16 loses digits",
        "94.6% of its nonzero values",
    )


def test_activations_and_what_was_not_measured_are_not_its_business() -> None:
    unmeasured = Operand("weight", None, weight="encoder.weight")
    assert not fires(GUARD, site("linear", result=1e-9, operands=(activation(1e-9), unmeasured)))


# --- in a plan -----------------------------------------------------------------------------------


def quiet(factor: float) -> nn.Sequential:
    """The weights of one layer are small, but no value that it reads or makes is."""
    return chain(
        first=diagonal(1e4), small=diagonal(factor), grow=diagonal(1e3), last=diagonal(1.0)
    )


@pytest.fixture(scope="module")
def small() -> Staged:
    return Staged.of(quiet(1e-8), spread(2, 4))


def test_it_keeps_the_layer_of_the_weight_in_fp32(small: Staged) -> None:
    assert table(small.plan()) == rows(
        """
        first/linear#0 | allow | op linear         | f16 | low | f16 f16
        small/linear#0 | deny  | guard weight-tiny | f32 | -   | f32 .
        grow/linear#0  | allow | op linear         | f16 | low | f16 f16
        last/linear#0  | allow | op linear         | f16 | low | . f16
        """
    )


@pytest.mark.slow
def test_bf16_and_tame_weights_are_all_low(small: Staged) -> None:
    assert all_low(small.plan("default", BF16))
    assert all_low(Staged.of(quiet(1e-4), spread(2, 4)).plan())


@pytest.mark.slow
def test_half_a_weight_may_be_tiny() -> None:
    """Zeros do not count: they survive."""
    model = quiet(1e-4)
    with torch.no_grad():
        model.small.weight[[0, 1], [0, 1]] = 1e-6
    assert guarded(Staged.of(model, spread(2, 4)).plan()) == {}
    with torch.no_grad():
        model.small.weight[2, 2] = 1e-6
    assert guarded(Staged.of(model, spread(2, 4)).plan()) == {"small/linear#0": "weight-tiny"}


def test_without_it_the_weights_vanish(small: Staged) -> None:
    assert error(small) < 2e-3
    assert error(small, rules_with(weight_tiny_share=False)) == 1.0
    assert error(small, rules_with(weight_tiny_share=False), BF16) < 1e-2


# --- by effect -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel", "limit", "expected"),
    [
        (19.9, 20.0, False),
        (20.1, 20.0, True),
        (NAN, 20.0, True),
        (None, 20.0, True),
        (1.0, False, True),
    ],
)
def test_a_weight_whose_loss_has_no_effect_is_low(
    channel: float | None, limit: float, expected: bool
) -> None:
    at = site("linear", operands=(weight(1e-5, 1.0),), growth=Growth(channel=channel))
    assert fires(GUARD, at, F16, weight_tiny_share=0.5, rounding_growth=limit) == expected


def _biased(size: float, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.bias.normal_(std=size)
        layer.weight[0] *= scale
    return layer.eval()


@pytest.mark.parametrize(
    ("bias", "scale", "low"),
    [
        (1e-6, 1.0, True),  # as torchvision's ViT begins: nothing beside the product
        (1e-6, 1e-9, False),  # one channel is all bias, and loses it
        (1e-6, 0.0, False),
    ],
)
def test_tiny_biases_are_weighed_by_what_they_do(bias: float, scale: float, low: bool) -> None:
    model, x = _biased(bias, scale), torch.randn(32, 16)
    [decision] = [
        d
        for d in amp.convert(model, x, calibration=[x, torch.randn(32, 16)], train=False).plan.eval
        if d.op == "aten.linear"
    ]
    assert decision.low is low, decision
    assert decision.guard == ("" if low else "weight-tiny")
