"""Training passes on evidence only: steps, soundness, random numbers, gradients; and real runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from amp_convert.validate.training.gradient_results import GradientDifference
from amp_convert.validate.training.results import PairedRun, TrainingParity
from amp_convert.verdict.training_checks import (
    MIN_STEPS,
    learnt_check,
    random_check,
    sound_check,
    steps_check,
    training_checks,
)
from tests.evidence import FP16
from tests.training_evidence import (
    LOSSES,
    arm,
    gradients,
    mixed_arm,
    over_seeds,
    parity,
    run,
)
from tests.verdict.training_statuses import statuses

NAN, INF = math.nan, math.inf


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
