"""Metrics, and what was run to judge by."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.verdict.thresholds import metric_holds, metric_limit
from tests.evidence import (
    FIRST,
    LAST,
    NODES,
    check,
    decision,
    divergence,
    in_fp32,
    metric,
    output,
    plan,
    verdict,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("fp32", "mixed", "lower", "status"),
    [
        (0.8, 0.792, False, "pass"),
        (0.8, 0.7919, False, "fail"),
        (0.8, 0.808, False, "pass"),
        (2.0, 2.02, True, "pass"),
        (2.0, 2.021, True, "fail"),
        # Too good to come from precision.
        (0.8, 0.9, False, "inconclusive"),
        (2.0, 1.0, True, "inconclusive"),
        # A negative metric, such as a log likelihood, loses by going down.
        (-50.0, -50.5, False, "pass"),
        (-50.0, -50.6, False, "fail"),
        # A small metric has a small tolerance, and one of 0 has none.
        (0.0, 0.0, True, "pass"),
        (0.0, 1e-9, True, "fail"),
        (1e-5, 1.011e-5, True, "fail"),
        (1e-5, -8e-5, False, "fail"),
        (0.8, NAN, False, "fail"),
        # What FP32 has no number for is no fault of the mixed model's.
        (NAN, 0.8, False, "inconclusive"),
        (NAN, NAN, True, "inconclusive"),
        (INF, INF, False, "inconclusive"),
        (INF, 1.0, True, "inconclusive"),
        (0.8, INF, False, "fail"),
    ],
)
def test_metric_tolerance(fp32: float, mixed: float, lower: bool, status: str) -> None:
    pair = metric("score", fp32=fp32, mixed=mixed, lower_is_better=lower)
    found = verdict(divergence(metrics=(metric(), pair)))
    assert check("metrics.score", found).status == status.replace("inconclusive", "unchecked")
    assert found.status == status


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"mixed": 0.96, "standard_error": 1e-3}, "fail", "0.96 mixed"),
        ({"mixed": 0.96, "standard_error": 0.01}, "unchecked", "more eval batches are needed"),
        ({"mixed": 0.99, "standard_error": 0.01}, "pass", ""),
        ({"mixed": 0.96, "standard_error": NAN}, "fail", ""),
        ({"unpaired": 2}, "fail", "on 2 batch(es) only one of the two has it"),
        ({"doubt": "stateful"}, "unchecked", "another value when it is called again"),
        ({"doubt": "constant"}, "unchecked", "the same for outputs that are certainly wrong"),
        ({"doubt": "constant", "mixed": 0.9}, "fail", ""),
        # Both signs: a value near to 0 is no scale, but how much it varies is.
        ({"fp32": 1e-4, "mixed": -9e-3, "spread": 1.0}, "pass", ""),
        ({"fp32": 1e-4, "mixed": -1.1e-2, "spread": 1.0}, "fail", ""),
    ],
)
def test_what_a_metric_shows(changes: dict[str, Any], status: str, says: str) -> None:
    pair = metric(**changes)
    one = check("metrics.accuracy", verdict(divergence(metrics=(pair,))))
    assert one.status == status
    assert says in one.reason


@pytest.mark.parametrize(
    ("changes", "status", "found"),
    [
        ({}, "pass", "pass"),
        ({"stopped": "time", "batches_given": 9}, "unchecked", "inconclusive"),
        ({"stopped": "time", "batches_given": None}, "unchecked", "inconclusive"),
        ({"stopped": "asked", "batches_given": 9}, "unchecked", "pass"),
    ],
)
def test_batches_that_were_not_seen(changes: dict[str, Any], status: str, found: str) -> None:
    given = verdict(divergence(**changes))
    one = check("batches.all", given)
    assert (one.status, given.status) == (status, found)
    if changes.get("batches_given"):
        assert one.reason.startswith("2 of 9 batches were seen")


def test_placeholders_are_no_evidence() -> None:
    found = verdict(divergence(same_inputs=True))
    assert found.status == "inconclusive"
    assert "Give real example_inputs or eval_batches" in check("batches.inputs", found).reason
    exact = (output(rel_l2=0.0, max_abs_err=0.0, cosine=1.0, slices=()),)
    run = divergence(same_inputs=True, outputs=exact, nodes=NODES[:1])
    nothing = plan(in_fp32(FIRST), rules=("fp32.toml",))
    assert check("batches.inputs", verdict(run, planned=nothing)).status == "pass"


def test_a_plan_that_converts_next_to_nothing_is_no_conversion() -> None:
    planned = plan(decision(FIRST, macs=2), in_fp32(LAST, macs=9998))
    found = verdict(divergence(nodes=NODES[:1]), planned=planned)
    one = check("plan.low_precision", found)
    assert (found.status, one.status, one.value) == ("inconclusive", "unchecked", 2e-4)
    assert "0.02% of the multiply-adds" in one.reason
    eager = replace(plan(decision(FIRST, macs=2)), eager_macs=9998)
    assert check("plan.low_precision", verdict(planned=eager)).status == "unchecked"


def test_what_a_buffer_adds_up_was_not_looked_at() -> None:
    rows = (output(), output("buffer total"))
    one = check("buffers.kept", verdict(divergence(outputs=rows, autocast_outputs=rows)))
    assert (one.status, one.required) == ("unchecked", False)
    assert "buffer total" in one.reason


def test_changed_routes_are_named() -> None:
    nodes = (*NODES[:2], replace(NODES[2], choices_changed=0.25))
    found = verdict(divergence(nodes=nodes))
    one = check("nodes.choices", found)
    assert (found.status, one.status, one.value) == ("pass", "unchecked", 0.25)
    assert "25.00% of its choices: routes changed" in one.reason
    same = (*NODES[:2], replace(NODES[2], choices_changed=0.0))
    assert check("nodes.choices", verdict(divergence(nodes=same))).status == "pass"


@pytest.mark.parametrize(("supplied", "status"), [(True, "inconclusive"), (False, "pass")])
def test_metrics_that_were_not_computed(supplied: bool, status: str) -> None:
    run = divergence(metrics=(), metrics_reason="the model file has no metrics")
    found = verdict(run, metrics_supplied=supplied)
    one = check("metrics", found)
    assert (found.status, one.status) == (status, "unchecked")
    assert one.reason == "the model file has no metrics"


def test_no_tolerance_means_no_loss() -> None:
    assert metric_limit(0.0, 0.0, lower_is_better=True) == 0.0
    assert metric_holds(0.5, metric_limit(0.5, 0.0, lower_is_better=False), lower_is_better=False)
    limit = metric_limit(0.5, 0.0, lower_is_better=False)
    assert not metric_holds(0.4999, limit, lower_is_better=False)


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"reference_rel_l2": 1e-7}, "fidelity.batches", "pass"),
        ({"reference_rel_l2": 1e-5}, "fidelity.batches", "fail"),
        ({"reference_rel_l2": float("nan")}, "fidelity.batches", "fail"),
        ({"frozen_identical": False}, "frozen.identical", "fail"),
        ({"frozen_identical": None}, "frozen.identical", "unchecked"),
        ({"unvisited": (FIRST,)}, "nodes.finite", "unchecked"),
    ],
)
def test_what_was_run_is_what_was_judged(changes: dict[str, Any], name: str, status: str) -> None:
    found = verdict(divergence(**changes))
    assert check(name, found).status == status
    assert found.status == {"pass": "pass", "fail": "fail", "unchecked": "inconclusive"}[status]


@pytest.mark.parametrize(("behind", "required"), [((), True), ((FIRST,), False)])
def test_only_what_lies_behind_the_parting_is_left_to_the_outputs(
    behind: tuple[str, ...], required: bool
) -> None:
    """An expert that no batch chose is a gap, whether or not paths parted somewhere."""
    found = divergence(unvisited=(FIRST,), parted_paths=2, behind_parting=behind)
    nodes = check("nodes.finite", verdict(found))
    assert (nodes.status, nodes.required) == ("unchecked", required)
