"""The checks on metrics after training, and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.validate.training.results import PairedRun
from amp_convert.verdict.check import Check
from amp_convert.verdict.training_run_checks import (
    loss_check,
    metric_check,
    other_metric_checks,
    seeds_check,
)
from tests.evidence import FP16
from tests.training_evidence import arm, mixed_arm, over_seeds, parity, run
from tests.verdict.run_evidence import ending, loss_of

NAN, INF = math.nan, math.inf


def metric_of(
    mixed: float,
    fp32: float = 0.9,
    noise: float | None = None,
    name: str = "accuracy",
    **changes: Any,
) -> Check:
    values = (fp32, mixed, fp32 if noise is None else noise)
    arms = (arm("fp32"), mixed_arm(), arm("noise"))
    given_arms = tuple(
        replace(one, metrics={"loss": 0.6, name: value})
        for one, value in zip(arms, values, strict=True)
    )
    paired = replace(PairedRun(0, 8, None, given_arms), **changes)
    return metric_check(parity(paired, metric=name), FP16)


# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixed", "status"),
    [
        (0.9, "pass"),
        (0.95, "pass"),  # better is no fault
        (1.0, "unchecked"),  # but no luck of precision's either
        (0.8911, "pass"),
        (0.8909, "unchecked"),
        (0.8551, "unchecked"),
        (0.8549, "fail"),
        (NAN, "fail"),
        (INF, "fail"),
        (-INF, "fail"),
    ],
)
def test_a_metric_may_lose_a_hundredth(mixed: float, status: str) -> None:
    check = metric_of(mixed)
    assert (check.name, check.status) == ("training.metric", status)
    assert check.threshold == pytest.approx(0.891)
    assert check.reason.startswith(
        f"accuracy is {mixed:.6g} mixed against 0.9 in FP32 after 8 steps"
    )


@pytest.mark.parametrize(
    ("mixed", "initial", "status"),
    [
        (0.0404, {}, "pass"),
        (0.0405, {}, "unchecked"),
        (0.0421, {}, "fail"),
        (0.0421, {"loss": 2.3}, "unchecked"),  # far down, a few per cent are soon lost
        (0.0459, {"loss": 2.3}, "unchecked"),
        (0.0461, {"loss": 2.3}, "fail"),
        (0.0421, {"loss": 0.05}, "fail"),  # it was no further off than that
        (0.0421, {"loss": NAN}, "fail"),
        (0.0421, {"loss": INF}, "fail"),
        (0.039, {}, "pass"),
        (0.02, {}, "unchecked"),
    ],
)
def test_a_metric_of_which_less_is_better(
    mixed: float, initial: dict[str, float], status: str
) -> None:
    assert metric_of(mixed, 0.04, name="loss", initial_metrics=initial).status == status


def test_a_metric_of_zero_is_held_to_what_was_learnt() -> None:
    """Relative to 0 nothing is small; what is a few hundredths of the way there may be luck."""
    for mixed, status in ((0.0, "pass"), (0.04, "unchecked"), (0.06, "fail")):
        found = metric_of(mixed, 0.0, name="loss", initial_metrics={"loss": 1.0})
        assert found.status == status
    assert metric_of(1e-9, 0.0, name="loss").status == "fail"


def test_a_small_metric_has_a_small_tolerance() -> None:
    """A loss times a millionth: 6e-6 against 3e-6 is twice as much."""
    for initial in (6e-6, 0.0, NAN, INF):
        small = metric_of(6e-6, 3e-6, name="loss", initial_metrics={"loss": initial})
        assert (small.status, small.threshold) == ("fail", pytest.approx(3e-6 + 3e-8))


def test_what_the_eval_samples_do_not_resolve_is_unchecked() -> None:
    paired = run(mixed=mixed_arm(metrics={"accuracy": 0.84}, metric_errors={"accuracy": 0.04}))
    assert metric_check(parity(paired), FP16).status == "unchecked"
    paired = run(mixed=mixed_arm(metrics={"accuracy": 0.84}, metric_errors={"accuracy": 0.01}))
    assert metric_check(parity(paired), FP16).status == "fail"


@pytest.mark.parametrize(
    ("noise", "status"),
    [(0.8, "unchecked"), (1.0, "unchecked"), (0.85, "fail"), (NAN, "fail"), (INF, "fail")],
)
def test_a_metric_of_a_chaotic_run(noise: float, status: str) -> None:
    assert metric_of(0.7, noise=noise).status == status


@pytest.mark.parametrize("noise", [0.0, NAN, INF])
def test_chaos_excuses_no_metric_that_is_no_number(noise: float) -> None:
    assert metric_of(NAN, noise=noise).status == "fail"


@pytest.mark.parametrize("fp32", [NAN, INF])
@pytest.mark.parametrize("mixed", [0.9, NAN])
def test_a_metric_that_fp32_has_no_number_for_judges_nothing(fp32: float, mixed: float) -> None:
    check = metric_of(mixed, fp32)
    assert check.status == "unchecked"
    assert check.reason == f"accuracy is {fp32} after FP32 training, which judges nothing"


def test_a_metric_that_an_arm_does_not_have() -> None:
    assert metric_check(parity(run(mixed=mixed_arm(metrics={}))), FP16).status == "fail"
    assert metric_check(parity(run(arm("fp32", metrics={}))), FP16).status == "unchecked"
    assert metric_check(parity(PairedRun(0, 0, None, ())), FP16).status == "unchecked"
    stopped = mixed_arm(note="its loss is nan at step 8")
    assert metric_check(parity(run(mixed=stopped)), FP16).status == "fail"


def test_without_eval_batches_there_is_no_metric() -> None:
    none: dict[str, Any] = {"metrics": {}}
    check = metric_check(
        parity(run(arm("fp32", **none), mixed_arm(**none)), metric="train_loss"), FP16
    )
    assert (check.status, check.value) == ("unchecked", None)
    assert check.reason == "there are no eval batches, so no metric was computed after training"


def test_the_training_loss_for_a_metric_is_judged_as_it_is_for_a_loss() -> None:
    chosen = parity(run(mixed=mixed_arm(ending(0.6))), metric="train_loss")
    assert metric_check(chosen, FP16) == replace(loss_check(chosen, FP16), name="training.metric")
    assert metric_check(chosen, FP16).status == "fail"


def test_every_other_metric_is_judged_too() -> None:
    """One called "loss" as well, whether it is the user's own or the loss on the eval batches."""
    values = {"loss": 0.6, "accuracy": 0.9, "f1": 0.8}
    paired = run(arm("fp32", metrics=values), mixed_arm(metrics={**values, "loss": 0.7, "f1": NAN}))
    found = {c.name: c.status for c in other_metric_checks(parity(paired), FP16)}
    assert found == {"training.metrics.loss": "fail", "training.metrics.f1": "fail"}
    assert other_metric_checks(parity(PairedRun(0, 0, None, ())), FP16) == []


WORSE = (0.91, 0.90, 0.92, 0.89, 0.90)


# --- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixed", "failures", "status"),
    [
        (WORSE, (), "pass"),
        (tuple(value - 0.1 for value in WORSE), (), "fail"),
        (tuple(value - 0.02 for value in WORSE), (), "unchecked"),
        ((*WORSE[:4], NAN), (), "fail"),
        (WORSE, ("", "its loss is nan at step 3"), "fail"),
    ],
)
def test_the_answer_over_seeds(
    mixed: Sequence[float], failures: Sequence[str], status: str
) -> None:
    check = seeds_check(over_seeds(WORSE, mixed, failures))
    assert (check.name, check.status, check.threshold) == ("training.seeds", status, -0.02)
    assert check.reason.startswith("accuracy: ")


def test_too_few_seeds_do_not_pass() -> None:
    check = seeds_check(over_seeds(WORSE[:4], WORSE[:4]))
    assert (check.status, check.value) == ("unchecked", None)
    assert "the first look needs 5 seeds, and 1 of them are missing" in check.reason


def test_fp32_that_diverges_is_no_reference_over_seeds() -> None:
    assert seeds_check(over_seeds((*WORSE[:4], NAN), WORSE)).status == "unchecked"


def test_pairs_that_were_not_judged_do_not_pass() -> None:
    check = seeds_check(replace(over_seeds(), noninferiority=None))
    assert (check.status, check.reason) == ("unchecked", "the pairs were not judged")


def test_an_answer_has_to_follow_from_its_pairs() -> None:
    passed = over_seeds(WORSE, WORSE)
    for pairs in (
        passed.pairs[:4],
        (),
        (*passed.pairs[:4], replace(passed.pairs[4], mixed=NAN)),
        (*passed.pairs[:4], replace(passed.pairs[4], fp32=NAN)),
        (*passed.pairs[:4], replace(passed.pairs[4], failure="its loss is nan at step 1")),
    ):
        check = seeds_check(replace(passed, pairs=pairs))
        assert check.status == "unchecked"
        assert check.reason.startswith("the answer is pass, but the pairs say ")


_numbers = st.floats(-10, 10)


_any = st.floats()


# --- properties ----------------------------------------------------------------------------------


@given(st.lists(_numbers, min_size=8, max_size=8), st.lists(_any, min_size=8, max_size=8), _any)
def test_a_loss_passes_only_within_its_tolerance(
    fp32: list[float], mixed: list[float], noise: float
) -> None:
    paired = run(arm("fp32", fp32), mixed_arm(mixed), arm("noise", [noise] * 8))
    if loss_of(paired).status == "pass":
        want, have = (fp32[6] + fp32[7]) / 2, (mixed[6] + mixed[7]) / 2
        assert abs(have - want) <= 0.01 * max(abs(want), abs(fp32[0] - want)) * (1 + 1e-9)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), _any)
def test_more_noise_or_a_larger_error_makes_no_pass(
    mixed: float, more: float, fp32: float, noise: float
) -> None:
    order = ["pass", "unchecked", "fail"]
    mixed += fp32  # a loss that is much smaller than FP32's is unchecked, too
    near, far = (metric_of(value, fp32, name="loss").status for value in (mixed, mixed + more))
    assert order.index(near) <= order.index(far)
    noisy = metric_of(mixed, fp32, noise, name="loss").status
    assert (noisy == "pass") == (near == "pass")
