"""What tests of this folder share."""

from __future__ import annotations

from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import (
    Noninferiority,
    judge_pairs,
)

# Twelve seeds of an accuracy, made up; the mixed arm is 0.0011 better on average.
FP32 = [0.912, 0.915, 0.909, 0.921, 0.913, 0.917, 0.911, 0.914, 0.918, 0.910, 0.916, 0.913]


def judged(
    mixed: list[float],
    fp32: list[float] | None = None,
    *,
    margin: float = 0.01,
    lower_is_better: bool = False,
) -> Noninferiority:
    fp32 = FP32[: len(mixed)] if fp32 is None else fp32
    return judge_pairs(fp32, mixed, Margin(margin), lower_is_better=lower_is_better)


def arms(values: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [full for full, _ in values], [low for _, low in values]
