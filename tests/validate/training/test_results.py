"""What a paired run says of its mixed arm whatever the losses, on values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.validate.training.results import PairedRun
from tests.training_evidence import LOSSES, STEPS, arm, mixed_arm, run

NAN, INF = math.nan, math.inf


def at(step: int, value: float, values: Sequence[float] = LOSSES) -> tuple[float, ...]:
    """The values with the one of a step, from 1, replaced."""
    return (*values[: step - 1], value, *values[step:])


def test_losses_of_the_ends() -> None:
    eight = arm("fp32")
    assert (eight.first_loss, eight.last_loss) == (2.0, 0.5)
    # The last quarter of 15 steps is 3 of them, that of 3 steps is one.
    assert arm("fp32", range(15)).last_loss == 13.0
    assert arm("fp32", (3.0, 2.0, 1.0)).last_loss == 1.0
    # No exception for what no mean can be formed of.
    assert arm("fp32", (1.0, 1e308, 1e308, *(1e308,) * 5)).last_loss == INF
    assert math.isnan(arm("fp32", (1.0,) * 6 + (INF, -INF)).last_loss)
    none = arm("fp32", ())
    assert math.isnan(none.first_loss)
    assert math.isnan(none.last_loss)


def test_a_metric_that_there_is_not_is_no_number() -> None:
    eight = arm("fp32")
    assert eight.metric("accuracy") == 0.9
    assert eight.metric("train_loss") == 0.5
    assert math.isnan(eight.metric("f1"))
    assert math.isnan(arm("fp32", note="its loss is nan at step 8").metric("accuracy"))


def test_a_sound_run_has_no_failure() -> None:
    assert run().failure == ""
    assert run(mixed=mixed_arm(scales=())).failure == ""
    assert PairedRun(0, 0, None, ()).failure == ""


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"losses": at(3, NAN)}, "its loss is nan at step 3, where FP32's is 1.25"),
        ({"losses": at(8, -INF)}, "its loss is -inf at step 8, where FP32's is 0.5"),
        (
            {"gradient_norms": at(8, INF, (1.0,) * 8)},
            "its gradients are not finite at step 8, where FP32's are",
        ),
        ({"scales": (1.0,) * 7 + (0.5,)}, "its loss scale fell under 1: 0.5"),
        (
            {"scales": (1.0, 0.5), "note": "its loss scale is under 1 after step 1: 1, 0.5"},
            "its loss scale fell under 1: its loss scale is under 1 after step 1: 1, 0.5",
        ),
        ({"scales": (NAN,) * 8}, "its loss scale is not finite: nan"),
        ({"scales": (INF,) * 8}, "its loss scale is not finite: inf"),
        ({"moved": NAN}, "its weights are not finite after the last step"),
        ({"moved": None}, "its weights are not finite after the last step"),
        (
            {"metrics": {"loss": NAN, "accuracy": 0.9}},
            "its metric loss is nan, where FP32's is 0.6",
        ),
        ({"metrics": {"loss": 0.6}}, "its metric accuracy is missing, where FP32's is 0.9"),
    ],
)
def test_what_fails_whatever_the_losses(changes: dict[str, Any], failure: str) -> None:
    assert run(mixed=mixed_arm(**changes)).failure == failure


def test_a_loss_scale_of_one_is_sound() -> None:
    assert run(mixed=mixed_arm(scales=(1.0,) * STEPS)).failure == ""


def test_what_fp32_does_not_have_either_is_no_failure() -> None:
    broken: dict[str, Any] = {"losses": at(8, NAN), "gradient_norms": at(7, INF, (1.0,) * 8)}
    nothing: dict[str, Any] = {"moved": NAN, "metrics": {"loss": INF}}
    assert run(arm("fp32", **broken, **nothing), mixed_arm(**broken, **nothing)).failure == ""
    still: dict[str, Any] = {"moved": None, "drift": None}
    assert run(arm("fp32", **still), mixed_arm(**still)).failure == ""


# --- steps that the loss scaler left out ---------------------------------------------------------


def skipping(steps: int, skipped: Sequence[int], *, static: bool = False) -> PairedRun:
    """A run whose loss scale halves after each step that was left out, or stays."""
    losses = (1.0,) * steps
    halvings = [0 if static else sum(s < step for s in skipped) for step in range(1, steps + 1)]
    scales = tuple(2.0 ** (250 - halved) for halved in halvings)
    norms = tuple(INF if step in skipped else 1.0 for step in range(1, steps + 1))
    mixed = mixed_arm(losses, scales=scales, skipped=tuple(skipped), gradient_norms=norms)
    return run(arm("fp32", losses), mixed)


@pytest.mark.parametrize(
    ("steps", "skipped"),
    [
        (50, ()),
        (50, (3, 7, 10)),  # in the warm-up of 10 steps
        (50, (40,)),  # one alone may be bad luck
        (50, range(1, 17)),  # from the first on, without a clean step
        (1000, range(1, 51)),  # the warm-up is 5 % of a long run
        (1000, (*range(1, 51), *range(100, 109))),  # 9 of the other 950 are under 1 %
    ],
)
def test_steps_left_out_while_the_scale_looks_for_its_place(
    steps: int, skipped: Sequence[int]
) -> None:
    assert skipping(steps, tuple(skipped)).failure == ""


@pytest.mark.parametrize(
    ("steps", "skipped", "late"),
    [
        (50, (20, 30, 40), 3),  # over 5 %, though the scale has only come down
        (50, (*range(2, 11), 11, 12, 13), 3),  # the first step was clean, so 11 to 13 are late
        (1000, (*range(1, 51), *range(100, 148)), 48),
    ],
)
def test_too_many_steps_left_out(steps: int, skipped: Sequence[int], late: int) -> None:
    assert skipping(steps, tuple(skipped)).failure == (
        f"{late} of its {steps} steps were left out because gradients overflowed, not counting "
        "those in which the loss scale looked for its place"
    )


def test_a_scale_that_stays_looks_for_nothing() -> None:
    """A static scale that always overflows trains nothing, from the first step on."""
    assert skipping(8, (1, 2, 3), static=True).failure.startswith("3 of its 8 steps were left out")
    assert skipping(8, (2,), static=True).failure == ""
    # What came after the last step nobody knows.
    every = skipping(8, range(1, 9), static=True).failure
    assert every.startswith("7 of its 8 steps were left out")


@given(st.sets(st.integers(1, 200)), st.integers(1, 200), st.booleans())
def test_a_step_more_left_out_mends_no_failure(skipped: set[int], more: int, static: bool) -> None:
    before = skipping(200, sorted(skipped), static=static)
    after = skipping(200, sorted(skipped | {more}), static=static)
    lengthens = set(range(1, more)) <= skipped  # the search at the beginning
    assert after.failure or lengthens or not before.failure
