"""The verdict passes on evidence only: what adds up to it, and the whole by properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.core.errors import UsageError
from amp_convert.validate.inference.results import Divergence
from amp_convert.validate.training.results import ArmRecord, TrainingParity
from amp_convert.verdict.verdict import Thresholds, Verdict, judge
from tests.evidence import (
    BOTH_MODES,
    DECISIONS,
    FP16,
    NODES,
    check,
    divergence,
    fidelity,
    label,
    metric,
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


def test_good_evidence_passes_with_every_check_in_a_fixed_order() -> None:
    found = verdict()
    assert found.status == "pass"
    assert {one.name: one.status for one in found.checks} == {
        "fidelity.eval": "pass",
        "fidelity.train": "pass",
        "fidelity.batches": "pass",
        "batches.all": "pass",
        "batches.inputs": "pass",
        "capture.whole": "pass",
        "plan.low_precision": "pass",
        "outputs.structure": "pass",
        "outputs.finite": "pass",
        "outputs.rel_l2": "pass",
        "outputs.cosine": "pass",
        "outputs.max_abs": "pass",
        "outputs.agreement": "pass",
        "outputs.channels": "pass",
        "outputs.samples": "pass",
        "outputs.vs_autocast": "pass",
        "nodes.finite": "pass",
        "buffers.kept": "pass",
        "frozen.identical": "pass",
        "outputs.untuned": "unchecked",
        "performance.inference": "unchecked",
        "metrics.accuracy": "pass",
        "training": "unchecked",
        "onnx": "unchecked",
    }
    assert all(one.reason for one in found.checks)
    # pydantic serialises an int here as a wrong type, with a warning.
    numbers = [n for one in found.checks for n in (one.value, one.threshold) if n is not None]
    assert {type(n) for n in numbers} == {float}


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("fail", 1), ("inconclusive", 3)])
def test_exit_codes_are_those_of_the_contract(status: Any, code: int) -> None:
    assert Verdict(status, ()).exit_code == code


def test_meta_device_leaves_everything_unchecked() -> None:
    rows = (fidelity("eval", status="unchecked", outputs=None, max_rel_l2=NAN, reason="meta"),)
    found = judge(rows, plan(device="meta"), None, FP16, metrics_supplied=False)
    assert found.status == "inconclusive"
    statuses = {one.name: one.status for one in found.checks}
    about_the_plan = {"capture.whole", "plan.low_precision"}
    assert {statuses[name] for name in statuses.keys() - about_the_plan} == {"unchecked"}
    assert "meta device" in check("outputs.rel_l2", found).reason


def test_without_a_run_nothing_passes() -> None:
    found = judge(BOTH_MODES, plan(), None, FP16, metrics_supplied=True)
    assert found.status == "inconclusive"
    assert check("outputs.rel_l2", found).reason == "the mixed graph was not run against FP32"


def test_zero_batches_is_nothing_to_judge() -> None:
    found = verdict(divergence(batches=0))
    assert found.status == "inconclusive"
    for name in ("outputs.finite", "outputs.rel_l2", "outputs.vs_autocast", "nodes.finite"):
        assert check(name, found).status == "unchecked"
        assert check(name, found).reason == "no batch was compared"
    assert check("metrics", found).status == "unchecked"


REQUIRED = {
    "fidelity.eval": True,
    "fidelity.train": False,
    "fidelity.batches": True,
    "capture.whole": False,
    "plan.low_precision": True,
    "outputs.rel_l2": True,
    "outputs.vs_autocast": False,
    "nodes.finite": True,
    "frozen.identical": True,
    "metrics.accuracy": True,
    "training.steps": True,
    "training.sound": True,
    "training.random": False,
    "training.gradients": False,
    "training.weights": True,
    "training.loss": True,
    "training.metric": True,
    "training.metrics.loss": False,
    "onnx": False,
}


def test_each_check_says_whether_the_verdict_needs_it() -> None:
    found = {one.name: one.required for one in verdict(training=parity()).checks}
    assert {name: found[name] for name in REQUIRED} == REQUIRED
    assert {one.name: one.required for one in verdict().checks}["training"] is False


@pytest.mark.parametrize("supplied", [True, False])
def test_metrics_are_required_where_the_user_gives_some(supplied: bool) -> None:
    found = verdict(divergence(metrics=()), metrics_supplied=supplied)
    assert check("metrics", found).required is supplied
    assert found.status == ("inconclusive" if supplied else "pass")


def test_thresholds_of_another_dtype_are_refused() -> None:
    with pytest.raises(UsageError, match=r"thresholds are for bfloat16, the plan for float16"):
        verdict(thresholds=Thresholds.for_dtype("bfloat16"))


_OUTPUT_NUMBERS = ("rel_l2", "cosine", "max_abs_err", "ref_abs_max")
_errors = st.floats(min_value=0, allow_nan=False)


def _into_output(field: str) -> Callable[[Divergence], Divergence]:
    def inject(run: Divergence) -> Divergence:
        return replace(run, outputs=(replace(run.outputs[0], **{field: NAN}), *run.outputs[1:]))

    return inject


def _into_metric(field: str) -> Callable[[Divergence], Divergence]:
    return lambda run: replace(run, metrics=(replace(run.metrics[0], **{field: NAN}),))


def _into_node(field: str) -> Callable[[Divergence], Divergence]:
    return lambda run: replace(run, nodes=(replace(run.nodes[0], **{field: NAN}), *run.nodes[1:]))


_INJECTIONS = [
    *(_into_node(field) for field in ("local_rel_l2", "accumulated_rel_l2")),
    *(_into_output(field) for field in _OUTPUT_NUMBERS),
    *(_into_metric(field) for field in ("fp32", "mixed")),
]


@given(
    inject=st.sampled_from(_INJECTIONS),
    rel_l2=st.floats(0, 1e-2),
    cosine=st.floats(0.9995, 1),
    others=st.integers(0, 3),
)
def test_nan_in_a_judged_number_never_passes(
    inject: Callable[[Divergence], Divergence], rel_l2: float, cosine: float, others: int
) -> None:
    rows = (output(rel_l2=rel_l2, cosine=cosine), *(output(f"[{n}]") for n in range(others)))
    run = divergence(outputs=rows, autocast_outputs=rows)
    assert verdict(run).status == "pass"
    # NaN in FP32's own metric is no fault of the mixed model's.
    assert verdict(inject(run)).status in ("fail", "inconclusive")


@given(
    before=st.tuples(_errors, _errors, st.integers(0, 9), st.integers(0, 9)),
    more=st.tuples(_errors, _errors, st.integers(0, 9), st.integers(0, 9)),
    theirs=_errors,
)
def test_a_larger_error_never_turns_fail_into_pass(
    before: tuple[float, float, int, int], more: tuple[float, float, int, int], theirs: float
) -> None:
    def status(rel_l2: float, max_abs: float, mismatches: int, nonfinite: int) -> str:
        rows = (
            output(rel_l2=rel_l2, max_abs_err=max_abs, nonfinite=nonfinite),
            label(mismatches),
        )
        nodes = (*NODES[:2], replace(NODES[2], nonfinite=nonfinite))
        run = divergence(outputs=rows, autocast_outputs=(output(rel_l2=theirs),), nodes=nodes)
        return verdict(run).status

    order = ["pass", "inconclusive", "fail"]
    doubled_batch = tuple(old + new for old, new in zip(before, more, strict=True))
    assert order.index(status(*doubled_batch)) >= order.index(status(*before))


@given(present=st.sets(st.sampled_from(["rows", "batches", "outputs", "nodes", "metrics"])))
def test_the_verdict_passes_only_with_all_the_evidence(present: set[str]) -> None:
    run = divergence(
        batches=2 if "batches" in present else 0,
        outputs=(output(),) if "outputs" in present else (),
        nodes=NODES if "nodes" in present else (),
        metrics=(metric(),) if "metrics" in present else (),
    )
    found = verdict(run, rows=BOTH_MODES if "rows" in present else ())
    assert found.status == ("pass" if len(present) == 5 else "inconclusive")


def test_evidence_is_not_changed_by_judging() -> None:
    run, planned = divergence(), plan(*DECISIONS)
    verdict(run, planned=planned)
    assert run == divergence()
    assert planned == plan(*DECISIONS)


# --- training ------------------------------------------------------------------------------------


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
