"""Training passes on evidence only: steps, soundness, random numbers, gradients; and real runs."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.gradient_results import GradientDifference
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.results import PairedRun, TrainingParity
from amp_convert.verdict.gradient_checks import gradients_check
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_checks import (
    MIN_STEPS,
    learnt_check,
    random_check,
    sound_check,
    steps_check,
    training_checks,
)
from tests import zoo
from tests.evidence import FP16, verdict
from tests.training import Trained, loss, recipe
from tests.training_evidence import (
    LOSSES,
    arm,
    difference,
    gradients,
    layer,
    mixed_arm,
    over_seeds,
    parity,
    run,
)

NAN, INF = math.nan, math.inf


def statuses(found: TrainingParity | None, limits: Thresholds = FP16) -> dict[str, str]:
    return {check.name: check.status for check in training_checks(found, "no batches", limits)}


def test_good_evidence_passes_every_check_in_a_fixed_order() -> None:
    assert statuses(parity()) == {
        "training.steps": "pass",
        "training.sound": "pass",
        "training.learnt": "pass",
        "training.random": "pass",
        "training.gradients": "pass",
        "training.weights": "pass",
        "training.loss": "pass",
        "training.metric": "pass",
        "training.metrics.loss": "pass",
    }


def test_over_seeds_the_test_stands_in_place_of_one_pair() -> None:
    assert list(statuses(over_seeds())) == [
        "training.steps",
        "training.sound",
        "training.learnt",
        "training.random",
        "training.gradients",
        "training.weights",
        "training.seeds",
        "training.metrics.loss",
    ]


def test_without_training_one_check_says_why() -> None:
    (check,) = training_checks(None, "model.py defines no loss", FP16)
    assert (check.name, check.status, check.value) == ("training", "unchecked", None)
    assert check.reason == "model.py defines no loss"


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "made", "reason"),
    [
        (parity(ended="interrupted after 8 of 9 steps"), 8, "interrupted after 8 of 9 steps"),
        (parity(steps=9), 8, "8 of 9 steps were made"),
        (parity(run(mixed=mixed_arm(LOSSES[:6]))), 6, "6 of 8 steps were made"),
        (parity(run(arm("fp32", LOSSES[:7]), steps=8)), 7, "7 of 8 steps were made"),
        (parity(PairedRun(0, 8, None, (arm("fp32"),))), 0, "0 of 8 steps were made"),
        (
            parity(run(arm("fp32", ()), mixed_arm(()), arm("noise", ())), steps=0),
            0,
            "too little is learnt in 0 steps: give --steps 5 or more",
        ),
        (
            parity(run(arm("fp32", LOSSES[:4]), mixed_arm(LOSSES[:4])), steps=4),
            4,
            "too little is learnt in 4 steps: give --steps 5 or more",
        ),
    ],
)
def test_steps_that_are_missing(found: TrainingParity, made: int, reason: str) -> None:
    check = steps_check(found)
    assert (check.status, check.value, check.reason) == ("unchecked", float(made), reason)


def test_the_fewest_steps_that_are_judged() -> None:
    few = LOSSES[:MIN_STEPS]
    check = steps_check(parity(run(arm("fp32", few), mixed_arm(few)), steps=MIN_STEPS))
    assert (check.status, check.value, check.threshold) == ("pass", 5.0, 5.0)


# --- soundness -----------------------------------------------------------------------------------


def test_a_failure_of_any_seed_fails() -> None:
    own = sound_check(parity(run(mixed=mixed_arm((*LOSSES[:7], NAN)))))
    assert (own.status, own.value) == ("fail", 1.0)
    assert own.reason == "the mixed arm: its loss is nan at step 8, where FP32's is 0.5"
    third = sound_check(over_seeds(failures=("", "", "its loss is inf at step 3")))
    assert (third.status, third.value) == ("fail", 1.0)
    assert third.reason == "the mixed arm: seed 2: its loss is inf at step 3"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (parity(PairedRun(0, 8, None, (arm("fp32"),))), "no step was made"),
        (parity(run(arm("fp32", ()), mixed_arm(()))), "no step was made"),
        (
            parity(run(arm("fp32", (*LOSSES[:7], NAN), note="its loss is nan at step 8"))),
            "FP32 training itself failed: its loss is nan at step 8",
        ),
        (
            parity(run(arm("fp32", (*LOSSES[:7], INF)))),
            "FP32 training itself failed: its loss is inf",
        ),
        (
            parity(run(arm("fp32", moved=NAN), mixed_arm(moved=NAN))),
            "FP32 training itself failed: its weights are not finite after the last step",
        ),
        (
            parity(run(arm("fp32", metrics={"loss": NAN}), mixed_arm(metrics={"loss": NAN}))),
            "FP32 training itself failed: its metric loss is nan",
        ),
        (
            parity(gradients=gradients(total=GradientDifference(9, 0.0, 1.0, 0.0, 0.0, None, 0))),
            "FP32 has no gradient other than 0 at the first step, so nothing is learnt",
        ),
    ],
)
def test_what_fp32_itself_lacks_is_unchecked_and_no_failure(
    found: TrainingParity, reason: str
) -> None:
    check = sound_check(found)
    assert (check.status, check.reason) == ("unchecked", reason)


def test_a_sound_run_says_what_the_loss_scale_did() -> None:
    skipped = mixed_arm(scales=(2.0**17,) + (2.0**16,) * 7, skipped=(1,))
    assert sound_check(parity(run(mixed=skipped))).reason == (
        "every loss is finite, 1 of 8 steps left out, loss scale 65536 at the end"
    )


# --- what was learnt ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        (LOSSES, "pass"),
        ((2.0,) * 8, "unchecked"),
        ((2.0, 1.9, 2.1, 2.0, 1.9, 2.0, 2.1, 1.9), "unchecked"),
        ((1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), "unchecked"),
        # Ever less, but never far enough for a difference of 2 % to show.
        ((2.0, 1.999, 1.998, 1.997, 1.996, 1.995, 1.994, 1.993), "unchecked"),
        ((3.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0), "unchecked"),
        ((9.0, 2.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01), "pass"),
        ((4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0), "pass"),
        ((2.0, 1.0, 0.5), "unchecked"),
        ((*LOSSES[:7], NAN), "unchecked"),
        ((), "unchecked"),
    ],
)
def test_where_nothing_is_learnt_nothing_is_tested(losses: Any, status: str) -> None:
    check = learnt_check(parity(run(arm("fp32", losses), mixed_arm(losses))))
    assert (check.status, check.required) == (status, True)


def test_numbers_from_outside_of_torch_leave_training_open() -> None:
    found = parity(run(random_parted=1, drawn_outside=("Python", "NumPy")))
    check = random_check(found)
    assert (check.status, check.required) == ("unchecked", True)
    assert "draws from Python and NumPy's random numbers" in check.reason
    assert not random_check(parity(run(random_parted=1))).required


# --- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "value"),
    [
        (parity(run(random_parted=4)), 4.0),
        (parity(gradients=gradients(same_random_numbers=False)), 1.0),
        (parity(run(arm("fp32", ()), mixed_arm(()), steps=0)), None),
    ],
)
def test_other_random_numbers_never_pass(found: TrainingParity, value: float | None) -> None:
    check = random_check(found)
    assert (check.status, check.value) == ("unchecked", value)


# --- gradients -----------------------------------------------------------------------------------


def judged(limits: Thresholds = FP16, **changes: Any) -> tuple[str, str]:
    check = gradients_check(parity(gradients=gradients(**changes)), limits)
    return check.status, check.reason


def total(rel_l2: float | None, **changes: Any) -> dict[str, Any]:
    return {"total": GradientDifference(**difference(rel_l2, **changes))}


@pytest.mark.parametrize(
    ("error", "rounded", "status"),
    [
        (0.1, None, "pass"),
        (0.101, None, "fail"),
        (0.101, 0.03, "fail"),
        # No more than three times what rounding the weights alone does to FP32's gradients.
        (0.7, 0.25, "unchecked"),
        (0.7, NAN, "fail"),
        (0.7, INF, "fail"),
        (NAN, 0.25, "fail"),
        (INF, 0.25, "fail"),
        (NAN, INF, "fail"),
        (None, 0.25, "unchecked"),
    ],
)
def test_the_error_of_all_gradients(
    error: float | None, rounded: float | None, status: str
) -> None:
    assert judged(**total(error), rounded_rel_l2=rounded)[0] == status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"zeroed_share": 0.1}, "pass"),
        ({"zeroed_share": 0.11}, "fail"),
        ({"zeroed_share": NAN}, "fail"),
        ({"rel_l2": 0.5}, "pass"),
        ({"rel_l2": 0.51}, "fail"),
        ({"rel_l2": NAN}, "fail"),
        # However small beside the others: what counts is its own noise.
        ({"zeroed_share": 1.0, "ref_abs_max": 2.0**-60}, "fail"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": 1e-3}, "fail"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": 0.9}, "pass"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": INF}, "pass"),
        # FP32's own part by as much once its weights are rounded: nobody can tell.
        ({"rel_l2": 0.6, "rounded_rel_l2": 0.2}, "unchecked"),
        ({"rel_l2": 0.6, "rounded_rel_l2": 0.19}, "fail"),
        ({"rel_l2": NAN, "rounded_rel_l2": 0.2}, "fail"),
        ({"rel_l2": 0.6, "rounded_rel_l2": NAN}, "fail"),
        ({"zeroed_share": 1.0, "rounded_rel_l2": 0.9}, "fail"),
    ],
)
def test_each_layer_is_held_to_its_own_noise(changes: dict[str, Any], status: str) -> None:
    one = replace(layer("encoder.0"), **changes)
    assert judged(layers=(layer(), one, layer("tail")))[0] == status


def test_a_lost_layer_is_named_and_no_rounding_excuses_it() -> None:
    status, reason = judged(
        layers=(layer(), layer("encoder.0", zeroed_share=0.25)), rounded_rel_l2=5.0, **total(1.0)
    )
    assert status == "fail"
    assert reason == (
        "the gradients of one step, at a loss scale of 65536, differ from FP32's by 1 (relative L2 "
        "of all), and 25 % of those of encoder.0 are 0, which FP32's are not"
    )


def test_what_is_wrong_whatever_the_tolerance_fails() -> None:
    assert judged(only_fp32=("head.weight", "head.bias")) == (
        "fail",
        "head.weight has a gradient in the FP32 model only, and 1 more",
    )
    assert judged(loss_mixed=NAN) == ("fail", "the mixed loss is nan, FP32's is 2")
    for difference_of_reference in (2e-6, NAN, INF):
        status, reason = judged(reference_rel_l2=difference_of_reference)
        assert status == "fail"
        assert reason.startswith("the captured FP32 graph has not the eager model's gradients")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        (total(0.5), "unchecked"),
        ({"layers": (layer(zeroed_share=0.5),)}, "unchecked"),
        (total(NAN), "fail"),
        ({"layers": (layer(zeroed_share=NAN),)}, "fail"),
        ({"only_mixed": ("head.weight",)}, "fail"),
    ],
)
def test_dropout_of_other_elements_is_no_error_and_no_excuse(
    changes: dict[str, Any], status: str
) -> None:
    assert judged(same_random_numbers=False, **changes)[0] == status


@pytest.mark.parametrize(
    ("error", "status"), [(0.0, "pass"), (1e-7, "unchecked"), (2e-6, "fail"), (NAN, "fail")]
)
def test_gradients_that_nothing_was_converted_in_are_exact(error: float, status: str) -> None:
    found, reason = judged(FP16.exact(), **total(error), rounded_rel_l2=0.5)
    assert found == status
    assert reason.endswith("add in no fixed order make of FP32") == (status == "unchecked")


def test_rounding_that_excuses_an_error_is_named() -> None:
    assert judged(**total(0.5), rounded_rel_l2=0.2)[1].endswith(
        "differ from FP32's by 0.5 (relative L2 of all); that is no more than 3 times what FP32's "
        "own differ by once its weights are rounded"
    )


# --- real runs -----------------------------------------------------------------------------------


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
