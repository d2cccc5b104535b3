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
    parity,
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
