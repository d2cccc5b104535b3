"""Findings as they are shown, and laws of the gate."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.gate.baseline import Baseline, baseline_of, baseline_text
from amp_convert.gate.compare import by_layer, compare
from amp_convert.gate.regressions import Regression, RegressionKind
from amp_convert.report import RunReport
from tests.evidence import (
    LAST,
    NODES,
    decision,
    divergence,
    gated,
    in_fp32,
    measured,
    metric,
    node_error,
    report,
)
from tests.gate.shown_findings import shown

NAN, INF = math.nan, math.inf


def test_findings_are_grouped_by_layer_with_the_worst_node_named() -> None:
    worst, other = "head/aten.linear#1", "head/aten.linear#2"
    names = (LAST, worst, other)
    nodes = tuple(decision(name) for name in names)

    def run(*errors: float) -> RunReport:
        rows = tuple(
            node_error(n, local_rel_l2=e, accumulated_rel_l2=1e-3)
            for n, e in zip(names, errors, strict=True)
        )
        return report(decisions=nodes, inference=divergence(nodes=rows))

    result = gated(run(5e-3, 9e-3, 6e-3), run(1e-3, 1e-3, 1e-3))
    assert len(result.findings) == 3
    ((finding, number),) = by_layer(result.findings)
    assert (finding.subject, number) == (worst, 3)
    text = shown(result)
    assert "FAIL" in text
    assert "0.001 -> 0.009 in head/aten.linear#1, worst of 3 findings" in text
    assert "grew 9 times, limit 2" in text
    assert other not in text


def test_nan_is_the_worst_of_a_layer() -> None:
    findings = [
        Regression(RegressionKind.ERROR, name, "head", 1e-3, after, "")
        for name, after in (("a", 1.0), ("b", NAN), ("c", 0.5))
    ]
    ((finding, _),) = by_layer(findings)
    assert finding.subject == "b"


def test_the_result_is_strict_json() -> None:
    result = gated(measured(node_error(LAST, local_rel_l2=NAN)))
    found = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert found["status"] == "fail"
    assert found["findings"][-1]["kind"] == "error"
    assert found["findings"][-1]["after"] == "NaN"


_error = st.none() | st.floats(0, 1e3, allow_nan=False)


@st.composite
def reports(draw: st.DrawFn) -> RunReport:
    """A passing report of random size, precisions, errors and metrics."""
    names = draw(
        st.lists(st.from_regex(r"[a-c](\.[0-9])?/aten\.[a-z]{1,4}#[0-9]", fullmatch=True),
                 min_size=1, max_size=6, unique=True)
    )  # fmt: skip
    nodes = (decision(names[0]), *(
        draw(st.sampled_from([decision, in_fp32]))(name) for name in names[1:]
    ))  # fmt: skip
    rows = tuple(
        node_error(n.node, local_rel_l2=draw(_error), accumulated_rel_l2=draw(_error))
        for n in nodes
    )
    value = draw(st.floats(-1e6, 1e6))
    pair = metric(fp32=value, mixed=value, lower_is_better=draw(st.booleans()))
    return report(
        decisions=nodes,
        inference=divergence(nodes=rows, metrics=(pair,)),
        casts=draw(st.integers(0, 99)),
    )


@pytest.mark.slow
@given(reports())
def test_any_passing_report_passes_against_its_own_baseline(run: RunReport) -> None:
    text = baseline_text(baseline_of(run))
    baseline = Baseline.model_validate_json(text)
    assert baseline == baseline_of(run)
    assert baseline_text(baseline) == text
    result = compare(run, baseline, factor=1.0, metric_tolerance=0.0)
    assert result.findings == ()
    any_error = any(n.local_rel_l2 is not None or n.accumulated_rel_l2 is not None
                    for n in baseline.nodes.values())  # fmt: skip
    assert result.status == ("pass" if any_error else "inconclusive")


@given(
    old=st.floats(0, 10),
    new=st.floats(0, 10),
    more=st.floats(0, 1e3),
    field=st.sampled_from(["local_rel_l2", "accumulated_rel_l2"]),
)
def test_a_larger_error_never_turns_fail_into_pass(
    old: float, new: float, more: float, field: str
) -> None:
    baseline = baseline_of(measured(node_error(LAST, **{field: old})))
    first = compare(measured(node_error(LAST, **{field: new})), baseline)
    doubled_batch = compare(measured(node_error(LAST, **{field: new + more})), baseline)
    assert (first.status, doubled_batch.status) != ("fail", "pass")


@given(node=st.integers(0, 2), field=st.sampled_from(["local_rel_l2", "accumulated_rel_l2"]))
def test_nan_in_a_node_never_passes(node: int, field: str) -> None:
    broken = measured(replace(NODES[node], **{field: NAN}))
    assert gated(broken).status == "fail"
    assert gated(broken, broken).status == "fail"
