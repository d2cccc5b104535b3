"""Weights, loss and metrics of a paired run: what passes, what is noise or luck, and what fails.

FP32's loss falls from 2 to 0.5, so losses are relative to 1.5; its accuracy is 0.9.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.validate.training.results import PairedRun
from amp_convert.verdict.check import Check
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.training_run_checks import (
    weights_check,
)
from tests.evidence import FP16
from tests.training_evidence import LOSSES, arm, mixed_arm, over_seeds, parity, run
from tests.verdict.run_evidence import ending, loss_of

NAN, INF = math.nan, math.inf


BF16 = Thresholds.for_dtype("bfloat16")


SEEDS = "; one pair cannot tell, --seeds can"


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (0.5, "pass"),
        (0.5124, "pass"),
        (0.4876, "pass"),
        (0.5126, "unchecked"),  # up to five times the tolerance may be luck
        (0.5624, "unchecked"),
        (0.5626, "fail"),
        (0.4874, "unchecked"),  # too good does not pass, and does not fail
        (-9.0, "unchecked"),
        (NAN, "fail"),
        (INF, "fail"),
        (-INF, "fail"),
    ],
)
def test_the_loss_is_judged_by_how_far_it_fell(last: float, status: str) -> None:
    check = loss_of(run(mixed=mixed_arm(ending(last))))
    assert check.status == status
    if status == "unchecked":
        assert check.reason.endswith(f"; that is beyond the tolerance, but can be luck{SEEDS}")


def test_a_loss_check_says_its_figures() -> None:
    check = loss_of(run(mixed=mixed_arm(ending(0.525))))
    assert check.value == pytest.approx(0.02)
    assert check.threshold == 0.01
    assert check.reason.startswith(
        "over the last quarter of 8 steps the loss is 0.525 mixed against 0.5 in FP32"
    )
    assert loss_of(run(mixed=mixed_arm(ending(0.524))), BF16).status == "pass"


@pytest.mark.parametrize(
    ("fp32", "mixed", "status"),
    [
        ((-1.0,) * 8, ending(-0.991, (-1.0,) * 6), "pass"),  # below 0, relative to 1
        ((-1.0,) * 8, ending(-0.9, (-1.0,) * 6), "fail"),
        ((0.0,) * 8, (0.0,) * 8, "pass"),
        ((0.0,) * 8, ending(1e-9, (0.0,) * 6), "fail"),  # relative to 0
        ((1.0, *(0.0,) * 7), ending(1e-3, (1.0,) * 6), "pass"),  # fell to 0, relative to 1
    ],
)
def test_losses_of_any_sign(fp32: tuple[float, ...], mixed: tuple[float, ...], status: str) -> None:
    assert loss_of(run(arm("fp32", fp32), mixed_arm(mixed), arm("noise", fp32))).status == status


def test_one_large_first_loss_allows_nothing() -> None:
    """It fell from the median of the first quarter, 2, and not from 10,000."""
    first = (1e4, 2.0, 2.0, *(1.0,) * 5, *(0.5,) * 4)
    good, bad = (1e4, *first[1:-3], *(0.51,) * 3), (1e4, *first[1:-3], *(0.6,) * 3)
    for losses, status in ((good, "pass"), (bad, "fail")):
        paired = run(arm("fp32", first), mixed_arm(losses), arm("noise", first))
        assert loss_of(replace(paired, steps=12)).status == status


def test_chaos_is_no_failure_and_no_pass() -> None:
    noisy = arm("noise", ending(0.46))  # 0.032 of 1.25; three times that is 0.096
    check = loss_of(run(mixed=mixed_arm(ending(0.615)), noise=noisy))
    assert check.status == "unchecked"
    assert check.reason.endswith(f"; FP32 nudged by one ULP parts by 0.032 as well{SEEDS}")
    assert loss_of(run(mixed=mixed_arm(ending(0.625)), noise=noisy)).status == "fail"


@pytest.mark.parametrize(
    "noise",
    [
        arm("noise", ending(NAN)),
        arm("noise", ending(INF)),
        arm("noise", LOSSES[:2]),
        arm("noise", ending(0.1), note="its loss is nan at step 8"),
        arm("noise", ()),
    ],
)
def test_noise_that_is_none_excuses_nothing(noise: Any) -> None:
    assert loss_of(run(mixed=mixed_arm(ending(0.6)), noise=noise)).status == "fail"


@pytest.mark.parametrize(
    ("mixed", "autocast", "status"),
    [
        (0.6, 0.6, "unchecked"),  # the dtype makes that of this training, and no conversion
        (0.6, 0.4, "unchecked"),
        (0.6, 0.51, "fail"),
        (0.6, NAN, "fail"),
        (1.4, 1.4, "fail"),  # half of what FP32 has learnt is missing in both
    ],
)
def test_native_autocast_that_parts_as_far(mixed: float, autocast: float, status: str) -> None:
    native = arm("autocast", ending(autocast))
    paired = run(mixed=mixed_arm(ending(mixed)))
    assert loss_of(replace(paired, arms=(*paired.arms, native))).status == status


@pytest.mark.parametrize("last", [NAN, INF])
@pytest.mark.parametrize("noisy", [5.0, NAN, INF])
def test_chaos_does_not_excuse_what_is_no_number(last: float, noisy: float) -> None:
    paired = run(mixed=mixed_arm(ending(last)), noise=arm("noise", ending(noisy)))
    assert loss_of(paired).status == "fail"


@pytest.mark.parametrize(
    "paired",
    [
        run(arm("fp32", ending(NAN)), mixed_arm(ending(NAN))),
        run(arm("fp32", ending(INF))),
        run(arm("fp32", LOSSES[:7])),
        run(arm("fp32", ()), mixed_arm(())),
        PairedRun(0, 8, None, (arm("fp32"),)),
    ],
)
def test_fp32_that_is_no_reference_leaves_the_loss_unchecked(paired: PairedRun) -> None:
    assert loss_of(paired).status == "unchecked"


def test_steps_left_out_put_the_mixed_arm_behind() -> None:
    """Two steps before, FP32's loss was (0.75 + 0.5) / 2 in the last quarter: 0.125 more."""
    skipping: dict[str, Any] = {"skipped": (1, 2), "scales": (4.0, 2.0, *(1.0,) * 6)}
    check = loss_of(run(mixed=mixed_arm(ending(0.63), **skipping)))
    assert check.status == "pass"
    assert check.threshold == pytest.approx(0.01 + 0.125 / 1.25)
    assert check.reason.endswith(", and 2 steps that were left out make 0.1 of the limit")
    assert loss_of(run(mixed=mixed_arm(ending(0.65), **skipping))).status == "unchecked"
    assert loss_of(run(mixed=mixed_arm(ending(1.3), **skipping))).status == "fail"
    # As many as there are steps: FP32's first quarter.
    every = mixed_arm(ending(0.5), skipped=tuple(range(1, 9)))
    assert loss_of(run(mixed=every)).threshold == pytest.approx(0.01 + (1.75 - 0.5) / 1.25)


def test_a_loss_that_must_be_exact_is_so_at_every_step() -> None:
    exact = FP16.exact()
    assert loss_of(run(), exact).status == "pass"
    once = run(mixed=mixed_arm((2.0, 1.5000001, *LOSSES[2:])))
    assert (loss_of(once).status, loss_of(once, exact).status) == ("pass", "fail")
    assert loss_of(run(mixed=mixed_arm(ending(0.4999999))), exact).status == "fail"
    behind = mixed_arm(ending(0.5, (2.0, 1.6, *LOSSES[2:6])), skipped=(1,))
    assert loss_of(run(mixed=behind), exact).status == "fail"
    noisy = replace(once, arms=(*once.arms[:2], arm("noise", (2.0, 1.50000012, *LOSSES[2:]))))
    assert loss_of(noisy, exact).status == "unchecked"


def weights_of(paired: PairedRun, limits: Thresholds = FP16, **changes: Any) -> Check:
    return weights_check(parity(paired, **changes), limits)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moved", "status"),
    [
        (1.0, "pass"),
        (0.5, "pass"),
        (2.0, "pass"),
        (0.49, "unchecked"),
        (2.1, "unchecked"),
        (0.25, "unchecked"),
        (4.0, "unchecked"),
        (0.24, "fail"),
        (4.1, "fail"),
        (0.0, "fail"),
        (-1.0, "fail"),
        (INF, "fail"),
        (NAN, "fail"),
    ],
)
def test_how_far_the_weights_moved(moved: float, status: str) -> None:
    check = weights_of(run(mixed=mixed_arm(moved=moved)))
    assert (check.status, check.threshold) == (status, "0.5 to 2")


def test_weights_of_a_chaotic_run() -> None:
    """FP32's noise moves 4 times as far, two powers of two; 3 times that is six."""
    noise = arm("noise", moved=4.0)
    assert weights_of(run(mixed=mixed_arm(moved=60.0), noise=noise)).status == "unchecked"
    assert weights_of(run(mixed=mixed_arm(moved=65.0), noise=noise)).status == "fail"
    for none in (0.0, NAN, INF, None):
        odd = run(mixed=mixed_arm(moved=65.0), noise=arm("noise", moved=none))
        assert weights_of(odd).status == "fail"


@pytest.mark.parametrize("moved", [None, NAN, INF])
def test_weights_of_fp32_that_did_not_move_judge_nothing(moved: float | None) -> None:
    fp32 = arm("fp32", moved=moved)
    assert weights_of(run(fp32, mixed_arm(moved=moved))).status == "unchecked"
    assert weights_of(run(fp32)).status == "unchecked"


def test_weights_of_an_arm_that_did_not_run_judge_nothing() -> None:
    for one in (arm("fp32"), mixed_arm()):
        alone = PairedRun(0, 8, None, (one,))
        assert weights_of(alone).status == weights_of(alone, FP16.exact()).status == "unchecked"
    pair = PairedRun(0, 8, None, (arm("fp32"), mixed_arm()))
    assert weights_of(pair).status == "pass"
    assert weights_of(pair, FP16.exact()).status == "fail"


def test_a_scale_that_left_out_every_step_trained_nothing() -> None:
    check = weights_of(run(mixed=mixed_arm(moved=0.0, drift=1.0, skipped=tuple(range(1, 9)))))
    assert check.status == "unchecked"
    assert "the loss scale left out every step; give more --steps" in check.reason


def test_over_seeds_the_weights_fail_on_gross_faults_only() -> None:
    answer = over_seeds().noninferiority
    for moved, status in ((4.0, "pass"), (4.1, "fail"), (0.0, "fail"), (NAN, "fail")):
        check = weights_of(run(mixed=mixed_arm(moved=moved)), noninferiority=answer)
        assert (check.status, check.threshold) == (status, "0.25 to 4")


@pytest.mark.parametrize(
    ("changes", "noise", "status"),
    [
        ({"drift": 0.0, "weights_sha256": "00"}, 0.0, "pass"),
        ({"drift": 0.0, "weights_sha256": "01"}, 0.0, "fail"),  # a buffer
        ({"drift": 0.0, "weights_sha256": "01"}, 1.0, "fail"),
        ({"drift": 1e-9, "weights_sha256": "00"}, 0.0, "fail"),
        ({"drift": 1e-9, "weights_sha256": "01"}, 1e-9, "unchecked"),
        ({"drift": 1.0, "weights_sha256": "01"}, 1e-9, "fail"),
        ({"drift": NAN, "weights_sha256": "00"}, 1.0, "fail"),
        ({"drift": None, "weights_sha256": "00"}, 1.0, "fail"),
    ],
)
def test_weights_that_nothing_was_converted_in_are_exact(
    changes: dict[str, Any], noise: float, status: str
) -> None:
    paired = run(mixed=mixed_arm(moved=1.0, **changes), noise=arm("noise", drift=noise))
    check = weights_of(paired, FP16.exact())
    assert (check.status, check.threshold) == (status, "the same bits")
