"""What the gate makes of its findings: status, notes, refusals, and what it shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.gate.baseline import Baseline, baseline_of
from amp_convert.gate.compare import GateResult, compare
from amp_convert.report import RunReport
from amp_convert.report.model import Judged
from amp_convert.verdict.thresholds import Thresholds
from tests.evidence import (
    DECISIONS,
    FIRST,
    LAST,
    NODES,
    SOFTMAX,
    decision,
    divergence,
    gated,
    kinds,
    metric,
    node_error,
    report,
)
from tests.training_evidence import parity

NAN, INF = math.nan, math.inf


def test_a_report_passes_against_its_own_baseline() -> None:
    result = gated(report())
    assert result == GateResult("pass", (), (), compared=3)
    assert result.exit_code == 0


def test_a_better_report_passes() -> None:
    better = report(
        decisions=(decision(FIRST), decision(SOFTMAX), decision(LAST)),
        inference=divergence(
            nodes=tuple(replace(n, local_rel_l2=1e-5, accumulated_rel_l2=1e-5) for n in NODES),
            metrics=(metric(mixed=0.98),),
        ),
        casts=0,
    )
    assert gated(better).status == "pass"


def test_gone_and_new_nodes_and_other_rules_are_noted() -> None:
    added = tuple(decision(f"extra.{n}/aten.linear#0") for n in range(4))
    nodes = (*NODES[1:], *(node_error(d.node) for d in added))
    now = report(
        decisions=(*DECISIONS[1:], *added), inference=divergence(nodes=nodes), rules=("half.toml",)
    )
    result = gated(now)
    assert result.status == "pass"
    assert result.compared == 3
    assert result.notes == (
        "rules were default.toml, are half.toml",
        "3 node(s) new: extra.1/aten.linear#0, extra.2/aten.linear#0, extra.3/aten.linear#0",
        f"1 node(s) go by other names, matched by structure: {FIRST} is extra.0/aten.linear#0",
    )


def judged(**changes: Any) -> RunReport:
    """A report that says by what it was judged, as a run's does."""
    limits = {n: v for n, v in vars(Thresholds.for_dtype("float16")).items() if n != "dtype"}
    found = Judged(limits=limits, batches=8, samples=64, steps=50, seeds=5, margin=0.02)
    return report().model_copy(update={"judged": found.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("changes", "subjects"),
    [
        ({}, []),
        ({"batches": 9, "steps": 60, "seeds": 6, "margin": 0.01}, []),
        ({"batches": 7}, ["batches"]),
        ({"samples": 16}, ["samples"]),
        ({"steps": 49}, ["steps"]),
        ({"seeds": 4}, ["seeds"]),
        ({"margin": 0.03}, ["margin"]),
    ],
)
def test_fewer_batches_steps_or_seeds_fail(changes: dict[str, Any], subjects: list[str]) -> None:
    result = gated(judged(**changes), judged())
    assert [(f.kind, f.subject) for f in result.findings] == [("looser", s) for s in subjects]


@pytest.mark.parametrize("name", ["output_rel_l2", "metric_tolerance", "loss_tolerance"])
def test_a_looser_tolerance_fails_and_a_tighter_one_does_not(name: str) -> None:
    limits = judged().judged.limits  # type: ignore[union-attr]
    for factor, expected in ((2.0, ["looser"]), (0.5, [])):
        now = judged(limits={**limits, name: limits[name] * factor})
        assert kinds(gated(now, judged())) == expected


@pytest.mark.parametrize("name", ["cosine", "agreement"])
def test_of_some_tolerances_the_smaller_is_the_looser(name: str) -> None:
    limits = judged().judged.limits  # type: ignore[union-attr]
    assert kinds(gated(judged(limits={**limits, name: 0.5}), judged())) == ["looser"]


def test_a_run_that_does_not_say_what_it_was_held_to_fails() -> None:
    assert kinds(gated(report(), judged())) == ["looser"]
    assert gated(judged(), report()).findings == ()


def test_work_that_leaves_low_precision_fails_wherever_it_goes() -> None:
    """A renamed encoder that fell back to eager FP32 has no nodes at all."""
    result = gated(report(share_macs_low=0.1), report(share_macs_low=0.99))
    assert kinds(result) == ["work"]
    assert gated(report(share_macs_low=0.985), report(share_macs_low=0.99)).findings == ()


def test_renamed_layers_are_matched_and_compared() -> None:
    def renamed(worse: float = 1.0) -> RunReport:
        names = {d.node: d.node.replace("encoder", "body.encoder") for d in DECISIONS}
        new = tuple(
            replace(d, node=names[d.node], layer=d.layer.replace("encoder", "body.encoder"))
            for d in DECISIONS
        )
        rows = tuple(replace(n, node=names[n.node], accumulated_rel_l2=2e-3 * worse) for n in NODES)
        return report(decisions=new, inference=divergence(nodes=rows))

    same = gated(renamed())
    assert (same.status, same.compared) == ("pass", 3)
    assert same.notes == (
        f"2 node(s) go by other names, matched by structure: {FIRST} is body.{FIRST}",
    )
    assert set(kinds(gated(renamed(worse=10.0)))) == {"error"}


def test_few_nodes_in_common_decide_nothing() -> None:
    others = tuple(decision(f"other.{n}/aten.conv2d#0") for n in range(3))
    nodes = (NODES[0], *(node_error(d.node) for d in others))
    result = gated(report(decisions=(DECISIONS[0], *others), inference=divergence(nodes=nodes)))
    assert (result.status, result.compared) == ("inconclusive", 1)
    assert result.notes[0].startswith("only 1 of the baseline's 3 nodes are still there")


def test_an_inconclusive_training_leaves_the_gate_inconclusive() -> None:
    stopped = report(training=parity(steps=9, ended="interrupted after 8 of 9 steps"))
    result = gated(stopped)
    assert (result.status, result.findings) == ("inconclusive", ())
    assert result.notes == ("the report's own verdict is inconclusive",)


def test_the_folder_of_a_rules_file_does_not_matter() -> None:
    before, now = report(rules=("/a/my.toml",)), report(rules=("/b/my.toml",))
    assert gated(now, before).notes == ()


def test_a_baseline_with_no_node_in_common_is_an_error() -> None:
    elsewhere = report(decisions=(decision("other/aten.conv2d#0"),))
    with pytest.raises(UsageError, match="no node in common, so nothing was compared"):
        gated(elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "the report's dtype is float16, the baseline's is bfloat16."),
        ({"device": "cuda"}, "the report's device is cpu, the baseline's is cuda."),
        (
            {"model": {"name": "bert", "model_class": "digits.Net"}},
            "the report's model is digits, the baseline's is bert.",
        ),
        (
            {"model": {"name": "digits", "model_class": "digits.Net2"}},
            "the report's model class is digits.Net, the baseline's is digits.Net2.",
        ),
    ],
)
def test_runs_of_different_kinds_are_refused_naming_both(
    change: dict[str, Any], message: str
) -> None:
    other = Baseline.model_validate(baseline_of(report()).model_dump() | change)
    with pytest.raises(UsageError) as error:
        compare(report(), other)
    assert str(error.value) == (
        f"{message} Compare runs of the same kind, or write this baseline anew with --update."
    )


def test_two_cards_of_one_kind_are_one_device() -> None:
    assert gated(report(device="cuda:1"), report(device="cuda:0")).status == "pass"


@pytest.mark.parametrize("factor", [NAN, INF, 0.5, -1.0])
def test_a_factor_that_passes_anything_is_refused(factor: float) -> None:
    with pytest.raises(UsageError, match="the factor is"):
        gated(report(), factor=factor)


@pytest.mark.parametrize("tolerance", [NAN, INF, -0.1])
def test_a_metric_tolerance_that_passes_anything_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="the metric tolerance is"):
        gated(report(), metric_tolerance=tolerance)
