"""Guards: measured values that keep a node in FP32 whatever its category says.

Each guard is a small class with one question about one node (see `site`). Its limit stands in the
rules file's `[guards]` table, where `false` switches it off. A range that holds NaN or infinity is
never within a limit: every comparison is written so that NaN fires.
"""

from __future__ import annotations

import torch

from amp_convert.plan.guards.activation_range import (
    ActivationFloor,
    ActivationRange,
    ProbedRange,
)
from amp_convert.plan.guards.cancellation import Cancellation
from amp_convert.plan.guards.choices import ChoiceError
from amp_convert.plan.guards.constants import Constants
from amp_convert.plan.guards.cumulative import Cumulative
from amp_convert.plan.guards.epsilon import Epsilon
from amp_convert.plan.guards.exp_sum import ExpSum
from amp_convert.plan.guards.increments import IncrementLoss
from amp_convert.plan.guards.logits import Logits
from amp_convert.plan.guards.outputs import OutputError
from amp_convert.plan.guards.positions import Angles, Positions
from amp_convert.plan.guards.reduction_depth import ReductionDepth
from amp_convert.plan.guards.rounding_growth import RoundingGrowth
from amp_convert.plan.guards.site import Consumer, Guard, GuardFinding, Operand, Site
from amp_convert.plan.guards.weight_range import WeightRange, WeightTiny
from amp_convert.rules.rule_set import GuardLimits

__all__ = ["ALL", "Consumer", "GuardFinding", "Guard", "Operand", "Site", "first_finding"]

ALL: tuple[Guard, ...] = (
    ActivationRange(),
    ProbedRange(),
    WeightRange(),
    WeightTiny(),
    ActivationFloor(),
    Constants(),
    Epsilon(),
    Positions(),
    Angles(),
    Logits(),
    ExpSum(),
    Cancellation(),
    Cumulative(),
    ReductionDepth(),
    RoundingGrowth(),
    OutputError(),
    ChoiceError(),
    IncrementLoss(),
)


def first_finding(site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
    """What the first guard that fires has to say, or None when the node may be low."""
    for guard in ALL:
        finding = guard.find(site, limits, dtype)
        if finding is not None:
            return finding
    return None
