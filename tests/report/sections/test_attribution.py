"""Where the error comes from, as a section: layers, or nodes where these were tried."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from amp_convert.attribute.results import Budget, Doubt
from amp_convert.report.model import RunReport, Unchecked
from amp_convert.report.sections.attribution import attribution_summary
from amp_convert.report.sections.gaps import gaps


def _with(report: RunReport, **changes: object) -> RunReport:
    assert isinstance(report.attribution, Budget)
    changed = replace(report.attribution, **changes)  # type: ignore[arg-type]
    return report.model_copy(update={"attribution": changed})


def test_layers_come_with_their_shares_and_the_sum_with_what_was_measured(
    small_report: RunReport,
) -> None:
    found = attribution_summary(small_report)
    assert found is not None
    assert [(row.layer, row.share) for row in found.rows] == [
        ("classifier", 0.64),
        ("features.0", 0.36),
    ]
    assert found.text == "predicted 5.00e-04, measured 4.50e-04 on one batch of 32 samples"
    assert not found.tried
    one = attribution_summary(small_report, most=1)
    assert one is not None
    assert len(one.rows) == 1


def test_nodes_stand_for_layers_where_they_were_tried(small_report: RunReport) -> None:
    budget = small_report.attribution
    assert isinstance(budget, Budget)
    first, second = budget.nodes
    nodes = (replace(second, trial_rel_l2=0.5), replace(first, rel_l2=0.0, trial_rel_l2=None))
    found = attribution_summary(_with(small_report, nodes=nodes, doubts=(Doubt.CHOICES,)))
    assert found is not None
    assert found.tried
    assert [(row.layer, row.tried) for row in found.rows] == [("features.0", 0.5)]
    assert "which no gradient shows" in found.text


@pytest.mark.parametrize("doubt", Doubt)
def test_each_doubt_has_its_words(small_report: RunReport, doubt: Doubt) -> None:
    plain = attribution_summary(small_report)
    found = attribution_summary(_with(small_report, doubts=(doubt,), first_order_rel_l2=math.nan))
    assert plain is not None
    assert found is not None
    assert found.text != plain.text


def test_what_could_not_be_told_is_a_gap_and_what_nobody_asked_for_is_none(
    small_report: RunReport,
) -> None:
    why = Unchecked(reason="the gradients of one batch do not fit")
    failed = small_report.model_copy(update={"attribution": why})
    assert attribution_summary(failed) is None
    assert why.reason in {gap.reason for gap in gaps(failed)}
    unasked = small_report.model_copy(update={"attribution": None})
    assert attribution_summary(unasked) is None
    assert len(gaps(unasked)) == len(gaps(small_report)) == len(gaps(failed)) - 1
