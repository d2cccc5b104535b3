"""What tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from amp_convert.capture.regions import capture
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.validate.training.arm_specs import PAIR
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training
from tests.training import OPTIMIZERS, POINTS


def convert(model: nn.Module, *args: torch.Tensor, preset: str = "fp32") -> ConvertedModel:
    captured = capture(model.eval(), args, {})
    stats = profile(captured, [(args, {})], [torch.float16])
    return convert_captured(captured, load_rules([preset]), stats, torch.float16)


def raced(
    converted: ConvertedModel,
    recipe: Recipe,
    data: Data = POINTS,
    steps: int = 6,
    names: tuple[str, ...] = PAIR,
) -> Race:
    """The race after its steps; the model is as it was."""
    model = converted.captured.model
    with training(model, converted):
        race = Race(model, converted, recipe, data, 0, names, steps)
        while race.step():
            pass
        race.outcome = race.result()  # type: ignore[attr-defined]
    return race


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](parameters)
