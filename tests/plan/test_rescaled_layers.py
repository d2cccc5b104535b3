"""Layers whose weights are scaled, so that their values stay in range."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Rewrites
from tests.plan.rescaled import (
    Biasless,
    attention,
    convolutions,
    error,
    feed_forward,
    guards_of,
    outputs,
    scaled,
)
from tests.staged import F16, Staged

OFF = replace(load_rules(["default"]), rewrites=Rewrites(clamp_masks=True))


def biasless() -> Staged:
    torch.manual_seed(0)
    return Staged.of(Biasless(), torch.randn(16, 32) * 4)


def scaled_by_hand(of: Staged) -> nn.Module:
    """The model of `feed_forward` in half precision, with the factors that its plan has."""
    model = copy.deepcopy(of.model)
    with torch.no_grad():
        model.up.weight.mul_(2.0**-5), model.up.bias.mul_(2.0**-5)
        model.middle.weight.mul_(2.0), model.middle.bias.mul_(2.0**-4)
        model.down.weight.mul_(16.0)
    return model.half()


MODELS = {"linear": feed_forward, "convolution": convolutions, "addmm": biasless}


@pytest.mark.slow
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_rescaled_layers_are_as_good_as_in_fp32(build: Callable[[], Staged]) -> None:
    of = build()
    assert of.plan().share_macs_low() == 1
    assert guards_of(of.plan()) == set()
    assert "guard activation-range" in guards_of(of.plan(OFF))
    assert of.plan(OFF).share_macs_low() < 1
    # What retreats is not rounded; what is rescaled is rounded as any low layer is.
    assert error(of) <= error(of, OFF) + torch.finfo(F16).eps


def test_the_whole_plan_of_layers() -> None:
    """The middle layer ends one region and begins the next."""
    up, middle = 2.0**-5, 2.0**-4
    assert scaled(feed_forward().plan()) == {
        "up/linear": (up, (1.0, up, up), 1.0),
        "/relu": (up, (), 1.0),
        "middle/linear": (middle, (1.0, middle / up, middle), 1.0),
        "/relu#1": (middle, (), 1.0),
        "down/linear": (1.0, (1.0, 1 / middle, 1.0), 1.0),
    }


def test_the_bits_are_those_of_weights_that_are_scaled_by_hand() -> None:
    of = feed_forward()
    with torch.no_grad():
        want = scaled_by_hand(of)(of.args[0].half()).float()
    assert torch.equal(outputs(of), want)


def test_layers_are_not_rescaled_in_training() -> None:
    """The gradient of the next layer's held weight is a sum of products with values near the end of
    the range: it would overflow whatever the loss scale."""
    of = feed_forward()
    assert all(d.scale == 1 for d in of.plan().train)
    want = [p.grad for p in graded(of.model.train(), of.args)]
    have = [p.grad for p in graded(of.convert().train(), of.args)]
    for expected, found in zip(want, have, strict=True):
        assert expected is not None
        assert found is not None
        assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_scores_are_scaled_in_training() -> None:
    of = attention()
    assert any(d.scale < 1 for d in of.plan().train)
    want = [p.grad for p in graded(of.model.train(), of.args)]
    have = [p.grad for p in graded(of.convert().train(), of.args)]
    for expected, found in zip(want, have, strict=True):
        assert expected is not None
        assert found is not None
        assert (found - expected).norm() <= 3e-2 * expected.norm()


def graded(model: nn.Module, args: tuple[Any, ...]) -> list[nn.Parameter]:
    """Copies of the parameters with their gradients."""
    model.zero_grad()
    model(*args).square().mean().backward()
    found = copy.deepcopy(list(model.parameters()))
    for parameter, original in zip(found, model.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    return found


@pytest.mark.slow
def test_a_node_is_compared_with_the_reference_times_its_factor() -> None:
    of = feed_forward()
    divergence = amp.compare(of.model.eval(), of.convert().eval(), [of.args])
    for row in divergence.nodes:
        assert row.accumulated_rel_l2 is not None
        assert row.accumulated_rel_l2 < 2e-3, row.node
        assert row.local_rel_l2 is not None
        assert row.local_rel_l2 < 1e-3, row.node
        assert row.overflow_fraction == 0
