"""The user's model file and settings -> what the training comparison takes.

Training is compared when the file defines `train_batches` and `loss`, unless `--no-train` says
otherwise; asking for it without them is an error. A file without `optimizer` is trained with AdamW
at PyTorch's defaults, and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from amp_convert.capture.captured import Captured
from amp_convert.core import device as devices
from amp_convert.core.batches import Batch
from amp_convert.core.errors import AmpConvertError, UnsupportedModelError, UsageError
from amp_convert.core.mode import Mode
from amp_convert.loading.model_file import Case
from amp_convert.loading.settings import Settings
from amp_convert.loading.user_functions import score, user_batches
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import DEFAULT_STEPS, MOST_STEPS, Options
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.seed_spread import Conditions, SeedSpread, load_seed_spread

EVAL_BATCHES = 8


def why_not(case: Case, settings: Settings, captured: Captured | None = None) -> str:
    """Why no training is compared; empty when it is.

    Raises UsageError, or UnsupportedModelError, where the user asked for it and it cannot be.
    """
    if settings.train is False:
        return "training is switched off (--no-train)"
    missing = [name for name in ("train_batches", "loss") if getattr(case, name) is None]
    regions = captured.in_mode(Mode.TRAIN).regions if captured is not None else ()
    failures = [region.train_failure for region in regions if region.train_failure]
    what, mend = "", ""
    error: type[AmpConvertError] = UsageError
    if missing:
        what = f"{case.name} defines no {' and no '.join(missing)}"
        mend = "Define train_batches(seed) and loss(outputs, target) in the model file."
    elif not devices.has_values(case.model):
        what, mend = "the model's tensors hold no values", "Load its weights on a real device."
    elif failures:
        error, what = UnsupportedModelError, f"the model has no train graph: {failures[0]}"
        mend = "Make its forward pass exportable in training mode, or give --no-train."
    elif settings.loss_scaling != "none":
        odd = [n for n, p in case.model.named_parameters() if p.is_complex() and p.requires_grad]
        if odd:
            what = (
                f"the parameter {odd[0]} is complex, and torch.amp.GradScaler cannot unscale its "
                "gradients: --loss-scale none trains without"
            )
            mend = "Give that, or --dtype bfloat16."
    if what and settings.train:
        raise error(f"training was asked for, but {what}", mend=mend)
    return what


def make_recipe(case: Case, settings: Settings) -> Recipe:
    """What the file and the settings say about a step."""
    assert case.loss is not None
    return Recipe(
        loss=case.loss,
        optimizer=case.optimizer or torch.optim.AdamW,
        scheduler=case.scheduler,
        scaling=_scaling(settings),
        accumulate=settings.accumulate,
        clip_norm=settings.clip_norm,
        path=case.path,
    )


def _scaling(settings: Settings) -> LossScaling:
    chosen = settings.loss_scaling
    if chosen == "none":
        return LossScaling("none")
    if chosen != "dynamic":
        return LossScaling("static", float(chosen))
    return LossScaling(
        "dynamic",
        settings.initial_scale,
        settings.scale_growth,
        settings.scale_backoff,
        settings.scale_interval,
    )


def make_data(case: Case, settings: Settings, device: torch.device) -> Data:
    """The file's batches, on `device`, its metrics and its first weights."""

    def train_batches(seed: int) -> Iterator[Batch]:
        make = case.train_batches
        assert make is not None
        at_most = (settings.steps or MOST_STEPS) * settings.accumulate
        for batch in user_batches("train_batches", partial(make, seed), case.path, at_most):
            yield devices.move(batch, device)

    def eval_batches() -> Iterator[Batch]:
        assert case.eval_batches is not None
        for batch in user_batches(
            "eval_batches", case.eval_batches, case.path, eval_batch_count(settings)
        ):
            yield devices.move(batch, device)

    return Data(
        train_batches,
        eval_batches if case.eval_batches else None,
        lambda outputs, target: score(case, outputs, target),
        case.initial_model,
    )


def eval_batch_count(settings: Settings) -> int:
    """How many eval batches the metrics after training rest on: each arm goes through them."""
    return settings.batches or EVAL_BATCHES


def make_options(case: Case, settings: Settings, device: torch.device) -> Options:
    """How the comparison is run. Raises UsageError for seeds without a margin, and for an FP32
    baseline of another model or of other training."""
    options = Options(
        steps=settings.steps,
        metric=settings.train_metric,
        lower_is_better=case.lower_is_better,
        checkpoint=Path(settings.checkpoint) if settings.checkpoint else None,
        checkpoint_every=settings.checkpoint_every,
        identity={"model": case.digest, "eval_batches": eval_batch_count(settings)},
    )
    seeds, margin = settings.seeds or 1, load_margin(settings)
    if not isinstance(margin, SeedSpread):
        return dataclasses.replace(options, seeds=seeds, margin=margin)
    under = conditions(case, settings, device)
    return dataclasses.replace(
        options,
        seeds=seeds,
        steps=under.steps,
        margin=margin.margin_for(under, settings.train_metric, case.lower_is_better),
        metric=margin.metric,
    )


def load_margin(settings: Settings) -> Margin | SeedSpread | None:
    """What a test over seeds takes its margin from; None without such a test. Raises UsageError for
    a file that is no file of FP32 seeds."""
    if settings.train is False or settings.seeds in (None, 1):
        return None
    if settings.fp32_seeds is not None:
        return load_seed_spread(Path(settings.fp32_seeds))
    return None if settings.margin is None else Margin(settings.margin)


def conditions(case: Case, settings: Settings, device: torch.device) -> Conditions:
    """What the spread of a metric over FP32 seeds depends on."""
    return Conditions(
        digest=case.digest,
        device=device.type,
        steps=settings.steps or DEFAULT_STEPS,
        accumulate=settings.accumulate,
        clip_norm=settings.clip_norm,
        batches=eval_batch_count(settings),
    )
