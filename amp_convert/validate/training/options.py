"""How a training comparison is run, and what a checkpoint of it has to agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amp_convert import __version__
from amp_convert.core import device as devices
from amp_convert.core.files import digests
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.noninferiority import require_test
from amp_convert.validate.training.recipe import Recipe

DEFAULT_STEPS = 50
MOST_STEPS = 200
"""So many steps are made where none are asked for and the first `DEFAULT_STEPS` teach nothing."""


@dataclass(frozen=True)
class Options:
    """How a training comparison is run.

    `steps` None takes up to `DEFAULT_STEPS`, or as many as there are batches for; up to
    `MOST_STEPS` where FP32 learns nothing in those. `seeds` is how
    many pairs may be trained, from seed 0 on; more than 1 needs a `margin`. `metric` is the one
    that is judged over seeds; None takes the first of the user's. `identity` is what a checkpoint
    must agree with, besides these options.
    """

    steps: int | None = None
    seeds: int = 1
    margin: Margin | None = None
    metric: str | None = None
    lower_is_better: frozenset[str] = frozenset()
    checkpoint: Path | None = None
    checkpoint_every: int = 25
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_test(self.seeds, has_margin=self.margin is not None)


def fingerprint(converted: ConvertedModel, recipe: Recipe, options: Options) -> dict[str, Any]:
    """All that decides about the bits of a run: a checkpoint goes on only where it is the same."""
    return {
        "steps": options.steps or "as many as there are",
        "seeds": options.seeds,
        "margin": None if options.margin is None else options.margin.value,
        "metric": options.metric,
        "accumulate": recipe.accumulate,
        "clip_norm": recipe.clip_norm,
        "loss_scaling": str(recipe.scaling),
        "dtype": converted.plan.dtype,
        "plan": digests.of_text(converted.plan.to_toml())[:16],
        "device": str(converted.captured.device),
        "kernels": devices.kernels_of(converted.captured.device),
        "amp_convert": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **options.identity,
    }
