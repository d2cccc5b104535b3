"""The loss scale follows the rule of `torch.amp.GradScaler`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from amp_convert.core.errors import UsageError
from amp_convert.validate.training.arm_specs import PAIR
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training
from tests.training import POINTS, classify, convert_net
from tests.validate.training.test_arm import OPTIMIZERS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"initial": 3.0}, "a loss scale of 3.0 is not a power of two of 1 or more"),
        ({"initial": 0.5}, "a loss scale of 0.5 is not a power of two of 1 or more"),
        ({"growth_factor": 1.0}, "the loss scale's growth factor is 1"),
        ({"growth_factor": math.nan}, "the loss scale's growth factor is nan"),
        ({"backoff_factor": 1.0}, "the loss scale's back-off factor is 1"),
        ({"backoff_factor": 0.0}, "the loss scale's back-off factor is 0"),
    ],
    ids=str,
)
def test_numbers_that_make_no_rule(given: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        LossScaling(**given)
    assert refused.value.what == said


@pytest.mark.slow
def test_the_scale_follows_its_rule() -> None:
    """Grows by 4 after 2 clean steps; too large at first, so it backs off by 8."""
    mixed = convert_net(torch.float16)
    rule = LossScaling("dynamic", 2.0**24, 4.0, 0.125, 2)
    recipe = Recipe(classify, OPTIMIZERS["sgd"], scaling=rule)
    with training(mixed.captured.model, mixed):
        race = Race(mixed.captured.model, mixed, recipe, POINTS, 0, PAIR, 12)
        while race.step():
            pass
    arm = race.arms["mixed"]
    scale, clean, expected = 2.0**24, 0, []
    for step in range(1, 13):
        expected.append(scale)
        if step in arm.skipped:
            scale, clean = scale / 8, 0
        elif (clean := clean + 1) == 2:
            scale, clean = scale * 4, 0
    assert arm.scales == expected
    assert 1 in arm.skipped
    assert len(arm.skipped) < 12
    assert [math.isfinite(norm) for norm in arm.norms] == [
        step not in arm.skipped for step in range(1, 13)
    ]
    assert race.arms["fp32"].scales == [1.0] * 12
    assert str(rule) == (
        "dynamic, from 1.67772e+07: times 4 after 2 clean steps, times 0.125 after an overflow"
    )
