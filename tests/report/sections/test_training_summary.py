"""What every writer says of training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from amp_convert.report.sections.training_summary import (
    ARMS,
    LookRow,
    PairRow,
    arms_shown,
    bounds_text,
    look_rows,
    noise_text,
    pair_rows,
    remarks,
    settings,
    steps_text,
    training_rows,
)
from amp_convert.validate.training.results import TrainingParity
from tests.report.trained import FP32_LOSSES, arm_of, four_arms, over_seeds, parity, run_of


def _rows(found: TrainingParity) -> dict[str, list[str]]:
    return {
        row.title: [row.values.get(spec.name, "") for spec in ARMS] for row in training_rows(found)
    }


def test_the_rows_have_one_value_an_arm() -> None:
    assert _rows(parity()) == {
        "loss, first step": ["2", "2.001", "2.001", "2"],
        "loss, last quarter": ["0.375", "0.376", "0.376", "0.375001"],
        "loss, eval batches": ["0.5", "0.501", "0.5", "0.5"],
        "accuracy": ["0.75", "0.74", "0.75", "0.75"],
        "loss drift from FP32": ["0", "1.00e-03", "1.00e-03", "1.00e-06"],
        "weight drift from FP32": ["0", "2.00e-02", "2.00e-02", "1.00e-05"],
        "steps skipped": ["", "1", "1", ""],
        "loss scale": ["", "65536→32768", "65536→32768", ""],
        "gradient norm, median": ["1", "1", "1", "1"],
        "weights moved, FP32's as 1": ["1", "1.01", "1.01", "1"],
        "time per step": ["2 ms", "1 ms", "1.5 ms", "2 ms"],
        "time, FP32's as 1": ["1", "0.5", "0.75", "1"],
        "peak memory": ["3 MiB", "2 MiB", "3 MiB", "3 MiB"],
    }


def test_what_no_arm_has_is_no_row() -> None:
    bare: dict[str, object] = {
        "metrics": {}, "milliseconds": None, "peak_bytes": None, "drift": None, "moved": None,
    }  # fmt: skip
    run = run_of(arm_of("fp32", [1.0, 0.5], **bare), arm_of("mixed", [1.0, 0.5], **bare))
    assert list(_rows(parity(run=run))) == [
        "loss, first step",
        "loss, last quarter",
        "loss drift from FP32",
        "gradient norm, median",
    ]
    assert arms_shown(run) == ["fp32", "mixed"]


def test_without_a_step_there_is_nothing_to_show() -> None:
    empty = parity(run=run_of(arm_of("fp32", []), arm_of("mixed", [])), ended="interrupted")
    assert training_rows(empty) == []
    assert arms_shown(empty.run) == []
    assert noise_text(empty) == ""
    assert remarks(empty) == ["interrupted"]


def test_a_metric_says_which_way_is_better_and_one_that_is_missing_is_empty() -> None:
    arms = (
        arm_of("fp32", [1.0], metrics={"perplexity": 3.0, "loss": 1.0}),
        arm_of("mixed", [1.0], metrics={}, note="its loss is nan at step 1"),
    )
    run = replace(run_of(*arms), initial_metrics={"perplexity": 9.0, "loss": 2.0})
    found = parity(run=run, lower_is_better=("loss", "train_loss", "perplexity"))
    rows = _rows(found)
    assert rows["perplexity (lower is better, 9 before training)"] == ["3", "", "", ""]
    assert rows["loss, eval batches (2 before training)"] == ["1", "", "", ""]
    assert remarks(found) == ["mixed stopped: its loss is nan at step 1"]
    ended = "the mixed arm stopped: its loss is nan at step 1"
    assert remarks(replace(found, ended=ended)) == [ended]


def test_numbers_that_are_not_finite_are_spelled_out() -> None:
    norms = (math.nan, math.inf, 1.0)
    arms = (arm_of("fp32", [1.0] * 3), arm_of("mixed", [1.0, math.nan], gradient_norms=norms))
    rows = _rows(parity(run=run_of(*arms)))
    assert rows["loss, last quarter"][:2] == ["1", "nan"]
    assert rows["loss drift from FP32"][:2] == ["0", "nan"]
    assert rows["gradient norm, median"][:2] == ["1", "inf"]


def test_a_scale_that_stays_is_shown_once() -> None:
    steady = arm_of("mixed", [1.0] * 3, scales=(2.0**24,) * 3)
    back = arm_of("mixed", [1.0] * 3, scales=(8.0, 4.0, 8.0))
    for arm, text in ((steady, "2²⁴"), (back, "8→8")):
        rows = _rows(parity(run=run_of(arm_of("fp32", [1.0] * 3), arm)))
        assert rows["loss scale"][1] == text
        assert rows["steps skipped"][1] == "0"


def test_the_settings_are_in_words() -> None:
    assert steps_text(parity()) == "8 steps of SGD, learning rate 0.1"
    assert settings(parity()) == [
        ("steps", "8"),
        ("optimizer", "SGD, learning rate 0.1"),
        ("schedule", "StepLR"),
        ("initial weights", "the model's own"),
        ("batches a step", "2"),
        ("gradient clipping", "to an L2 norm of 1"),
        ("loss scaling", "dynamic, from 65536"),
        ("seed", "0"),
    ]
    changed = parity(steps=1000, clip_norm=None, **over_seeds([0.9] * 5, [0.9] * 5))
    assert settings(changed)[0] == ("steps", "8 of 1,000")
    assert settings(changed)[5] == ("gradient clipping", "none")
    assert settings(changed)[-1] == ("judged metric", "accuracy")


@pytest.mark.parametrize(
    ("noise", "mixed", "says"),
    [
        (1e-6, 1e-3, "ends 1,000 times nearer to FP32's loss than the mixed arm does: what the "
                     "mixed arm differs by is its precision, not chaos"),
        (1e-12, 1e-3, "ends over a million times nearer to FP32's loss than the mixed arm does: "
                      "what the mixed arm differs by is its precision, not chaos"),
        (0.0, 1e-3, "ends with the very loss of FP32: what the mixed arm differs by is its "
                    "precision, not chaos"),
        (4e-4, 1e-3, "ends about as far from FP32's loss as the mixed arm does: what that differs "
                     "by cannot be told from chaos"),
    ],
)  # fmt: skip
def test_the_noise_says_how_chaotic_training_is(noise: float, mixed: float, says: str) -> None:
    losses = [0.0] * 8
    run = run_of(
        arm_of("fp32", losses),
        arm_of("mixed", [mixed] * 8),
        arm_of("noise", [noise] * 8),
    )
    assert noise_text(parity(run=run)) == f"FP32 from weights nudged by one ULP {says}"


def test_an_arm_of_fp32s_own_bits_has_no_noise_to_be_told_from() -> None:
    run = run_of(*(arm_of(name, [1.0] * 8) for name in (spec.name for spec in ARMS)))
    assert noise_text(parity(run=run)) == "the mixed arm ends with the very loss of FP32"


def test_noise_is_silent_where_it_knows_nothing() -> None:
    for name in ("fp32", "mixed", "noise"):
        arms = tuple(arm for arm in four_arms().arms if arm.arm != name)
        assert noise_text(parity(run=replace(four_arms(), arms=arms))) == ""
    arms = (*four_arms().arms[:3], arm_of("noise", [math.nan] * 8))
    assert noise_text(parity(run=replace(four_arms(), arms=arms))) == ""


def test_pairs_are_above_0_where_mixed_is_better() -> None:
    found = parity(**over_seeds([0.9, 0.8, 0.7], [0.9, 0.81, math.nan]))
    assert pair_rows(found) == [
        PairRow(0, "0.9", "0.9", "0", ""),
        PairRow(1, "0.8", "0.81", "+0.01", ""),
        PairRow(2, "0.7", "nan", "+nan", ""),
    ]
    lower = parity(metric="loss", **over_seeds([2.0, 2.0], [1.5, 2.5], lower=True))
    assert [pair.difference for pair in pair_rows(lower)] == ["+0.5", "-0.5"]


def test_looks_say_what_they_answered() -> None:
    differences = [0.05, -0.05, 0.05, -0.05, 0.05, -0.05, 0.05, -0.05]
    fp32 = [0.5] * 8
    mixed = [0.5 + d for d in differences]
    five = over_seeds(fp32[:5], mixed[:5], 0.02)["noninferiority"]
    eight = over_seeds(fp32, mixed, 0.02)["noninferiority"]
    assert [look.answer for look in look_rows(five)] == ["go on"]  # type: ignore[arg-type]
    assert [look.answer for look in look_rows(eight)] == ["go on", "go on"]  # type: ignore[arg-type]
    twelve = over_seeds(fp32 + fp32[:4], mixed + mixed[:4], 0.02)["noninferiority"]
    answers = [look.answer for look in look_rows(twelve)]  # type: ignore[arg-type]
    assert answers == ["go on", "go on", "inconclusive"]


def test_a_look_has_its_interval() -> None:
    # Differences of 1 and 3 in turn: mean 1.8, variance 1.2, and t(0.983, 4) = 3.18632 by SciPy.
    mixed = [1.0, 3.0, 1.0, 3.0, 1.0]
    answer = over_seeds([0.0] * 5, mixed, 1.0)["noninferiority"]
    assert look_rows(answer) == [  # type: ignore[arg-type]
        LookRow(5, "+1.8", "1.09545", "+0.239", "+3.361", "pass")
    ]
    assert bounds_text(answer) == (  # type: ignore[arg-type]
        "Above 0, mixed is better. Each bound holds with 98.3 % confidence. Pass when the lower "
        "one is above -1 (the margin), fail when the upper one is below that"
    )


def test_the_chosen_losses_are_those_of_the_last_quarter() -> None:
    assert sum(FP32_LOSSES[-2:]) / 2 == 0.375
