"""What training does to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.validate.training.results import ArmRecord, TrainingParity
from amp_convert.verdict.verdict import judge
from tests.evidence import (
    BOTH_MODES,
    FP16,
    check,
    divergence,
    output,
    plan,
    verdict,
)
from tests.training_evidence import (
    LOSSES,
    STEPS,
    arm,
    gradients,
    layer,
    mixed_arm,
    over_seeds,
    parity,
    run,
)

NAN = math.nan


def test_training_that_was_not_asked_for_does_not_block() -> None:
    found = judge(
        BOTH_MODES,
        plan(),
        divergence(),
        FP16,
        metrics_supplied=True,
        no_training="model.py defines no loss",
    )
    assert (found.status, found.checks[-2].name) == ("pass", "training")
    assert check("training", found).reason == "model.py defines no loss"


@pytest.mark.parametrize("training", [parity(), over_seeds()], ids=["one pair", "seeds"])
def test_good_training_passes(training: TrainingParity) -> None:
    assert verdict(training=training).status == "pass"


def test_training_that_converts_nothing_must_be_exact() -> None:
    """What is allowed depends on the train graph, whatever the eval graph is in."""
    exact = parity(
        run(mixed=mixed_arm(drift=0.0, moved=1.0, weights_sha256="00")), gradients=gradients(0.0)
    )
    in_fp32 = plan(train=())
    assert verdict(planned=in_fp32, training=exact).status == "pass"
    assert verdict(planned=in_fp32, training=parity()).status == "fail"


WITHOUT_METRICS = run(arm("fp32", metrics={}), mixed_arm(metrics={}), arm("noise", metrics={}))


@pytest.mark.parametrize(
    ("training", "supplied", "status"),
    [
        (parity(ended="interrupted after 3 of 8 steps"), True, "inconclusive"),
        (parity(steps=9), True, "inconclusive"),
        (parity(run(arm("fp32", ()), mixed_arm(()), arm("noise", ()))), True, "inconclusive"),
        (parity(run(random_parted=2)), True, "pass"),
        (parity(gradients=gradients(0.5, rounded_rel_l2=0.2)), True, "pass"),
        (parity(gradients=gradients(0.5)), True, "fail"),
        (parity(metric="train_loss"), True, "pass"),
        (parity(WITHOUT_METRICS, metric="train_loss"), True, "inconclusive"),
        (parity(WITHOUT_METRICS, metric="train_loss"), False, "pass"),
        (over_seeds((0.9,) * 4, (0.9,) * 4), True, "inconclusive"),
        (over_seeds((0.9,) * 5, (0.8,) * 5), True, "fail"),
        (over_seeds(failures=("its loss is nan at step 2",)), True, "fail"),
        (replace(over_seeds(), noninferiority=None), True, "inconclusive"),
        (replace(over_seeds(), ended="interrupted after 3 of 8 steps of seed 5"), True,
         "inconclusive"),
    ],
)  # fmt: skip
def test_what_training_does_to_the_verdict(
    training: TrainingParity, supplied: bool, status: str
) -> None:
    assert verdict(training=training, metrics_supplied=supplied).status == status


def test_a_good_training_does_not_mend_a_bad_inference() -> None:
    run_with_nan = divergence(outputs=(output(rel_l2=NAN),))
    assert verdict(run_with_nan, training=parity()).status == "fail"


_BROKEN = [NAN, math.inf, -math.inf]


_Change = Callable[[TrainingParity, Any], TrainingParity]


def _in_arm(name: str, field: str) -> _Change:
    """Break a number of one arm: the last of a list, the named metric of a dict."""

    def inject(found: TrainingParity, value: Any) -> TrainingParity:
        def change(one: ArmRecord) -> ArmRecord:
            old = getattr(one, field)
            new = value
            if isinstance(old, tuple):
                new = (*old[:-1], value)
            elif isinstance(old, dict):
                new = {**old, "loss": value}
            return replace(one, **{field: new})

        arms = tuple(change(one) if one.arm == name else one for one in found.run.arms)
        return replace(found, run=replace(found.run, arms=arms))

    return inject


def _in_gradients(field: str) -> _Change:
    def inject(found: TrainingParity, value: Any) -> TrainingParity:
        seen = found.gradients
        if field in ("reference_rel_l2", "loss_mixed"):
            changed = replace(seen, **{field: value})
        elif field == "zeroed_share":
            changed = replace(seen, layers=(layer(zeroed_share=abs(value)), *seen.layers))
        else:
            changed = replace(seen, total=replace(seen.total, **{field: value}))
        return replace(found, gradients=changed)

    return inject


def _in_pair(field: str) -> _Change:
    """Break a pair's metric, with the answer left as it was, or worked out anew."""

    def inject(found: TrainingParity, value: Any) -> TrainingParity:
        if not found.pairs:
            return _in_arm(field, "metrics")(found, value)
        pairs = (replace(found.pairs[0], **{field: value}), *found.pairs[1:])
        return replace(found, pairs=pairs)

    return inject


_IN_TRAINING = {
    "the loss of FP32": _in_arm("fp32", "losses"),
    "the loss": _in_arm("mixed", "losses"),
    "the gradients' norm": _in_arm("mixed", "gradient_norms"),
    "the loss scale": _in_arm("mixed", "scales"),
    "FP32's weights": _in_arm("fp32", "moved"),
    "the weights": _in_arm("mixed", "moved"),
    "FP32's metric": _in_arm("fp32", "metrics"),
    "the metric": _in_arm("mixed", "metrics"),
    "the reference": _in_gradients("reference_rel_l2"),
    "the loss of one step": _in_gradients("loss_mixed"),
    "the gradients' error": _in_gradients("rel_l2"),
    "what a layer has lost": _in_gradients("zeroed_share"),
    "FP32's metric of a seed": _in_pair("fp32"),
    "the metric of a seed": _in_pair("mixed"),
}


@given(
    what=st.sampled_from(sorted(_IN_TRAINING)),
    value=st.sampled_from(_BROKEN),
    noise=st.sampled_from([0.5, *_BROKEN]),
    seeds=st.booleans(),
)
def test_no_training_passes_with_a_number_that_is_none(
    what: str, value: float, noise: float, seeds: bool
) -> None:
    """Whatever FP32's own noise is, chaos or NaN."""
    noisy = run(noise=arm("noise", (noise,) * STEPS, moved=noise, metrics={"loss": noise}))
    good = replace(over_seeds() if seeds else parity(), run=noisy)
    assert verdict(training=good).status == "pass"
    assert verdict(training=_IN_TRAINING[what](good, value)).status != "pass"


# Mostly good evidence, so that many of them pass and others miss by one number.
_near = st.sampled_from([*[0.0] * 12, 1e-3, 5e-3, 0.02, 0.05, 0.3, NAN, math.inf])


_moved = st.sampled_from([*[1.0] * 12, 0.0, 0.4, 1.9, 3.0, 40.0, NAN, None])


@given(
    loss=_near,
    error=_near,
    metric=_near,
    moved=_moved,
    noise=_near,
    rounded=st.sampled_from([None, 0.2, NAN]),
    skipped=st.sampled_from([*[0] * 8, *range(1, STEPS + 1)]),
    ended=st.sampled_from([*[""] * 5, "interrupted after 3 of 8 steps"]),
    parted=st.booleans(),
)
def test_training_passes_only_with_all_that_is_required(
    loss: float,
    error: float,
    metric: float,
    moved: float | None,
    noise: float,
    rounded: float | None,
    skipped: int,
    ended: str,
    parted: bool,
) -> None:
    scales = tuple(2.0 ** (16 - min(step, skipped)) for step in range(STEPS))
    mixed = mixed_arm(
        (*LOSSES[:6], 0.5 + loss, 0.5 + loss),
        moved=moved,
        metrics={"loss": 0.6, "accuracy": 0.9 - metric},
        skipped=tuple(range(1, skipped + 1)),
        scales=scales,
    )
    nudged = arm("noise", (*LOSSES[:6], 0.5 + noise, 0.5 + noise), moved=1 + noise)
    training = parity(
        run(mixed=mixed, noise=nudged, random_parted=1 if parted else None),
        gradients=gradients(error, rounded_rel_l2=rounded),
        ended=ended,
    )
    found = verdict(training=training)
    for one in found.checks:
        if one.status == "fail" or (one.required and one.status == "unchecked"):
            assert found.status != "pass"
    if found.status == "pass":
        assert not ended
        assert moved in (1.0, 1.9)
        assert metric <= 0.009
        # Steps that were left out may cost what they cost FP32.
        behind = sum(LOSSES[max(0, 6 - skipped) : max(2, 8 - skipped)]) / 2 - 0.5
        assert loss <= 0.015 + behind + 1e-9
        assert error <= 0.1 or (rounded == 0.2 and error <= 0.6)
