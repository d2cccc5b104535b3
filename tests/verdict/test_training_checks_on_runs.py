"""The training checks on real runs."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_checks import (
    training_checks,
)
from tests import zoo
from tests.evidence import FP16, verdict
from tests.training import Trained, loss, recipe
from tests.verdict.training_statuses import statuses


def trained(
    name: str, dtype: torch.dtype, how: Recipe, rules: str = "default", steps: int = 12
) -> TrainingParity:
    """A model of the zoo, trained, with its training loss for a metric."""
    converted = zoo.converted(name, rules, dtype)
    batches = Data(functools.partial(_batches, name))
    return compare_training(converted, how, batches, Options(steps=steps))


def _batches(name: str, seed: int) -> Any:
    return Trained(name).batches(seed)


SCALED = {torch.float16: LossScaling(), torch.bfloat16: LossScaling("none")}


@pytest.mark.slow
@zoo.both_dtypes
@pytest.mark.parametrize("name", ["cnn", "lstm", "gpt2"])
def test_a_healthy_model_passes(name: str, dtype: torch.dtype) -> None:
    found = trained(name, dtype, recipe(scaling=SCALED[dtype]))
    limits = Thresholds.for_dtype(str(dtype).removeprefix("torch."))
    checks = {check.name: check for check in training_checks(found, "", limits)}
    # On random batches little is learnt in 12 steps.
    assert {n: c.status for n, c in checks.items() if c.status != "pass"}.items() <= {
        "training.metrics": "unchecked",
        "training.learnt": "unchecked",
    }.items()
    # With room to spare: what the limits were chosen by.
    for which in ("gradients", "loss"):
        check = checks[f"training.{which}"]
        assert isinstance(check.value, float)
        assert isinstance(check.threshold, float)
        assert check.value < check.threshold / 2


@pytest.mark.parametrize("name", ["cnn", "lstm", "gpt2"])
def test_nothing_converted_is_exact(name: str) -> None:
    found = trained(name, torch.float16, recipe(), "fp32")
    checks = training_checks(found, "", FP16.exact())
    open_ones = ("training.metrics", "training.learnt")
    assert {check.status for check in checks if check.name not in open_ones} == {"pass"}
    (weights,) = (check for check in checks if check.name == "training.weights")
    assert weights.threshold == "the same bits"
    one_bit = replace(found.run.arms[1], weights_sha256="0")
    other = replace(found, run=replace(found.run, arms=(found.run.arms[0], one_bit)))
    assert statuses(other, FP16.exact())["training.weights"] == "fail"


@pytest.mark.parametrize("name", ["lstm", "gpt2"])
def test_a_loss_of_a_millionth_without_a_scale_fails(name: str) -> None:
    """Most gradients are under FP16's smallest number. AdamW makes full steps of what is left, so
    the loss alone may tell little."""
    small = replace(
        recipe(scaling=LossScaling("none")), loss=lambda out, target: loss(out, target) * 1e-6
    )
    found = statuses(trained(name, torch.float16, small))
    assert found["training.gradients"] == "fail"
    assert found["training.random"] == "pass"


def _static(scale: float) -> LossScaling:
    return LossScaling("static", scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scaling", "steps", "expected"),
    [
        # A static scale that always overflows never backs off: no step is made.
        (_static(2.0**40), 12, {"training.sound": "fail", "training.gradients": "fail"}),
        # A dynamic one starts at a scale that the gradients bear: no step is left out to find it.
        (LossScaling(initial=2.0**60), 8, {"training.sound": "pass", "training.weights": "pass"}),
    ],
    ids=["static", "dynamic"],
)
def test_a_scale_that_overflows_at_first(
    scaling: LossScaling, steps: int, expected: dict[str, str]
) -> None:
    found = statuses(trained("gpt2", torch.float16, recipe(scaling=scaling), steps=steps))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("stop", [0, 3, 9], ids=["at once", "in the first seed", "in the second"])
def test_seeds_that_were_interrupted_never_pass(stop: int) -> None:
    ticks = itertools.count()
    found = compare_training(
        zoo.converted("lstm"),
        recipe(),
        Data(functools.partial(_batches, "lstm")),
        Options(steps=6, seeds=5, margin=Margin(10.0)),
        should_stop=lambda: next(ticks) >= stop,
    )
    assert found.interrupted
    open_checks = {name for name, status in statuses(found).items() if status == "unchecked"}
    assert {"training.steps"} <= open_checks
    assert ("training.seeds" in open_checks) == (stop == 9)
    assert verdict(training=found).status == "inconclusive"
