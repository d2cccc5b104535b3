"""Each way of getting worse is found and named."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.capture.captured import Uncaptured
from amp_convert.gate.regressions import Regression, RegressionKind
from amp_convert.report import RunReport
from amp_convert.verdict.verdict import Check, Verdict
from tests.evidence import (
    DECISIONS,
    LAST,
    NODES,
    decision,
    divergence,
    gated,
    in_fp32,
    kinds,
    measured,
    metric,
    node_error,
    output,
    report,
)

NAN, INF = math.nan, math.inf


UNIT = 2.0**-11


def test_a_layer_newly_in_fp32_is_named_with_rule_reason_and_source() -> None:
    kept = in_fp32(
        LAST,
        rule="guard activation-range",
        reason="its input nears the largest float16",
        source="measured",
        evidence="abs max 71234 against 65504",
    )
    result = gated(report(decisions=(*DECISIONS[:2], kept)))
    assert result.findings == (
        Regression(
            RegressionKind.NEWLY_FP32,
            LAST,
            "head",
            "float16",
            "float32",
            "guard activation-range: its input nears the largest float16 "
            "(measured, measured: abs max 71234 against 65504)",
        ),
    )
    assert (result.status, result.exit_code) == ("fail", 1)


def test_an_fp32_node_without_a_local_error_is_one_finding() -> None:
    now = report(
        decisions=(*DECISIONS[:2], in_fp32(LAST)),
        inference=divergence(nodes=(*NODES[:2], replace(NODES[2], local_rel_l2=None))),
    )
    assert kinds(gated(now)) == ["newly-fp32"]


def test_a_layer_whose_op_came_back_in_fp32_under_another_name_is_found() -> None:
    renamed = in_fp32(
        "head/aten.addmm#0", category="unknown", rule="unknown op", reason="in no rule", source="-"
    )
    result = gated(report(decisions=(*DECISIONS[:2], renamed)))
    (finding,) = result.findings
    assert (finding.kind, finding.layer) == (RegressionKind.NEWLY_FP32, "head")
    assert finding.subject == "head/aten.addmm#0"
    assert finding.reason == "unknown op: in no rule (-)"


@pytest.mark.parametrize(("macs", "expected"), [(1000, ["newly-fp32"]), (0, [])])
def test_in_a_layer_still_partly_low_a_replacement_counts_when_it_multiplies(
    macs: int, expected: list[str]
) -> None:
    gelu = decision("head/aten.gelu#0")
    before = report(
        decisions=(*DECISIONS, gelu), inference=divergence(nodes=(*NODES, node_error(gelu.node)))
    )
    now = report(
        decisions=(*DECISIONS[:2], gelu, in_fp32("head/aten.addmm#0", macs=macs)),
        inference=divergence(nodes=(*NODES, node_error(gelu.node))),
    )
    assert kinds(gated(now, before)) == expected


def test_a_layer_that_can_no_longer_be_captured_is_found() -> None:
    part = Uncaptured("encoder", "a branch on a value", "model.py:50")
    before = report(uncaptured=(replace(part, layer="roi"),))
    now = report(decisions=DECISIONS[2:], uncaptured=(part,))
    (finding,) = gated(now, before).findings
    assert (finding.kind, finding.layer) == (RegressionKind.NEWLY_FP32, "encoder.0")
    assert finding.reason == "no longer captured, stays eager FP32: a branch on a value"


@pytest.mark.parametrize("field", ["local_rel_l2", "accumulated_rel_l2"])
@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (1e-3, 2e-3, False),
        (1e-3, 2.01e-3, True),
        # Below one rounding everything counts as one: noise growing a thousand times is noise.
        (1e-9, 1e-6, False),
        (0.0, 1.99 * UNIT, False),
        (0.0, 2.01 * UNIT, True),
        (1e-3, INF, True),
        (1e-3, NAN, True),
        (None, NAN, True),
        (None, 5e-3, False),
        (INF, INF, False),
    ],
)
def test_error_growth(field: str, old: float | None, new: float, worse: bool) -> None:
    result = gated(
        measured(node_error(LAST, **{field: new})), measured(node_error(LAST, **{field: old}))
    )
    # A NaN fails the report's own verdict too.
    assert result.status == ("fail" if worse else "pass")
    errors = [finding for finding in result.findings if finding.kind is RegressionKind.ERROR]
    assert len(errors) == worse
    for finding in errors:
        assert (finding.subject, finding.layer) == (LAST, "head")
        assert field.partition("_")[0] in finding.reason


def test_the_factor_is_the_caller_s() -> None:
    now = measured(node_error(LAST, local_rel_l2=2.9e-3))
    assert gated(now).status == "fail"
    assert gated(now, factor=3.0).status == "pass"


def test_bfloat16_has_a_wider_noise_floor() -> None:
    def run(error: float) -> RunReport:
        return report(
            inference=divergence(nodes=(*NODES[:2], node_error(LAST, local_rel_l2=error))),
            dtype="bfloat16",
        )

    assert gated(run(7.8e-3), run(1e-6)).status == "pass"
    assert gated(run(7.9e-3), run(1e-6)).status == "fail"


def test_an_error_that_is_no_longer_measured_is_found() -> None:
    result = gated(measured(node_error(LAST, local_rel_l2=None)))
    assert kinds(result) == ["unmeasured"]
    assert result.findings[0].reason == "its local error is no longer measured"


def test_a_node_that_overflows_now_fails() -> None:
    result = gated(measured(node_error(LAST, nonfinite=1, accumulated_rel_l2=INF)))
    assert kinds(result) == ["verdict", "check", "error"]
    assert "nodes.finite" in result.findings[0].reason


@pytest.mark.parametrize(
    ("old", "new", "lower", "worse"),
    [
        (0.97, 0.9604, False, False),
        (0.97, 0.9602, False, True),
        (0.97, 0.99, False, False),
        (0.5, 0.505, True, False),
        (0.5, 0.506, True, True),
        (0.97, NAN, False, True),
        (NAN, 0.97, False, True),
    ],
)
def test_a_metric_drop(old: float, new: float, lower: bool, worse: bool) -> None:
    def run(value: float) -> RunReport:
        # The FP32 arm moves along, so that only the comparison with the baseline can see the drop.
        pair = metric("score", fp32=value, mixed=value, lower_is_better=lower)
        return report(inference=divergence(metrics=(pair,)))

    found = [f for f in gated(run(new), run(old)).findings if f.kind is RegressionKind.METRIC]
    assert len(found) == worse
    if worse:
        assert found[0].subject == "score"


def test_the_metric_tolerance_is_the_caller_s() -> None:
    now = report(inference=divergence(metrics=(metric(fp32=0.93, mixed=0.93),)))
    assert kinds(gated(now)) == ["metric"]
    assert gated(now, metric_tolerance=0.05).status == "pass"


def test_a_metric_whose_direction_changed_is_not_compared() -> None:
    now = report(inference=divergence(metrics=(metric(lower_is_better=True),)))
    (finding,) = gated(now).findings
    assert finding.reason == "lower_is_better was changed, so the values cannot be compared"


def test_a_metric_that_is_gone_fails() -> None:
    now = report(inference=divergence(metrics=(metric("f1"),)))
    result = gated(now)
    assert kinds(result) == ["check"]
    assert (result.findings[0].subject, result.findings[0].after) == ("metrics.accuracy", "gone")


def test_casts_added_fail_and_casts_removed_do_not() -> None:
    (finding,) = gated(report(casts=5)).findings
    assert (finding.kind, finding.before, finding.after) == (RegressionKind.CASTS, 3, 5)
    assert gated(report(casts=2)).status == "pass"


def with_checks(now: RunReport, status: Any, *checks: Check) -> RunReport:
    """`now` with another verdict; checks of the same name are replaced."""
    new = {check.name: check for check in checks}
    old = tuple(new.pop(check.name, check) for check in now.verdict.checks)
    return now.model_copy(update={"verdict": Verdict(status, (*old, *new.values()))})


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ("pass", "unchecked", ["check"]),
        ("fail", "unchecked", ["check"]),
        ("pass", "fail", ["verdict", "check"]),
        ("fail", "fail", ["verdict"]),
        ("fail", "pass", []),
        ("unchecked", "unchecked", []),
        ("unchecked", "pass", []),
        ("unchecked", "fail", ["verdict"]),
    ],
)
def test_a_check_that_ran_must_still_run(was: Any, now: Any, expected: list[str]) -> None:
    def run(status: Any) -> RunReport:
        overall = "fail" if status == "fail" else "pass"
        return with_checks(report(), overall, Check("training", status, None, None, "because"))

    assert kinds(gated(run(now), run(was))) == expected


def test_a_check_that_is_gone_fails() -> None:
    whole = report()
    less = whole.model_copy(update={"verdict": Verdict("pass", whole.verdict.checks[1:])})
    (finding,) = gated(less).findings
    assert (finding.subject, finding.before, finding.after) == ("fidelity.eval", "pass", "gone")


def test_a_report_that_fails_cannot_pass_even_against_its_own_baseline() -> None:
    failing = report(inference=divergence(outputs=(output(rel_l2=0.5),)))
    result = gated(failing, failing)
    assert (result.status, kinds(result)) == ("fail", ["verdict"])
    assert result.findings[0].reason.startswith("the report's own verdict is fail: outputs.rel_l2")


def test_an_inconclusive_report_does_not_pass() -> None:
    unsure = report(inference=divergence(nodes=NODES[:2]))
    result = gated(unsure, unsure)
    assert (result.status, result.exit_code) == ("inconclusive", 3)
    assert result.notes == ("the report's own verdict is inconclusive",)


def test_a_run_without_inference_does_not_pass() -> None:
    blind = report().model_copy(update={"inference": None})
    result = gated(blind)
    assert result.status == "fail"
    assert {"unmeasured"} == set(kinds(result))


def test_a_baseline_without_errors_leaves_the_gate_inconclusive() -> None:
    blind = report().model_copy(update={"inference": None})
    result = gated(report(), blind)
    assert result.status == "inconclusive"
    assert "the baseline holds no node errors, so none were compared" in result.notes
