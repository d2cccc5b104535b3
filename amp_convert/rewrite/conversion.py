"""Captured graphs and rules -> a converted model whose kernels exist."""

from __future__ import annotations

import logging

import torch

from amp_convert.capture.captured import Captured
from amp_convert.plan.planner import make_plan
from amp_convert.profile.calibrate import RangeStats
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.rule_set import Rules

_log = logging.getLogger(__name__)


def convert_captured(
    captured: Captured, rules: Rules, stats: RangeStats, dtype: torch.dtype
) -> ConvertedModel:
    """Plan, rewrite, and run each graph once on the example inputs to see that its kernels exist.

    Operators whose kernels refuse their planned dtypes are kept in FP32, with what each said as the
    evidence, and the model is planned anew: once, unless what is around them changes with that.
    Raises KernelError for an operator that a rule pins all the same.
    """
    refused: dict[str, str] = {}
    while True:
        plan = make_plan(captured, rules, stats, dtype, refused)
        converted = ConvertedModel(captured, plan)
        found = converted.try_kernels(refused)
        if not found:
            return converted
        for op, cause in found.items():
            _log.info("%s stays in FP32, the plan is made anew: %s", op, cause)
        refused |= found
