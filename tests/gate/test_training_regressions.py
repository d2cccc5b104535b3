"""What got worse in training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amp_convert.gate.regressions import RegressionKind
from amp_convert.validate.training.results import TrainingParity
from tests.evidence import (
    NODES,
    divergence,
    gated,
    kinds,
    metric,
    report,
)
from tests.training_evidence import LOSSES, arm, mixed_arm, over_seeds, parity, run


def test_training_that_no_longer_runs_is_found_check_by_check() -> None:
    result = gated(report(), report(training=parity()))
    assert kinds(result) == ["check"] * 9
    (sound,) = (f for f in result.findings if f.subject == "training.sound")
    assert (sound.before, sound.after) == ("pass", "gone")
    assert sound.reason == "ran in the baseline and no longer does: gone"


def test_what_few_samples_leave_open_is_no_regression() -> None:
    nodes = (*NODES[:2], replace(NODES[2], choices_changed=0.25))
    assert gated(report(inference=divergence(nodes=nodes)), report()).findings == ()
    same = (*NODES[:2], replace(NODES[2], choices_changed=0.0))
    result = gated(
        report(inference=divergence(nodes=nodes)), report(inference=divergence(nodes=same))
    )
    assert result.findings == ()
    assert "nodes.choices passed in the baseline and has no answer now" in result.notes[0]


def test_a_large_spread_now_excuses_no_metric() -> None:
    worse = divergence(metrics=(metric(fp32=0.4, mixed=0.4, standard_error=0.3),))
    assert "metric" in kinds(gated(report(inference=worse), report()))


def test_training_that_is_new_or_the_same_is_no_finding() -> None:
    now = report(training=parity())
    assert gated(now, report()).findings == ()
    assert gated(now, now).findings == ()


def test_a_training_check_that_fails_now_is_found() -> None:
    now = report(training=parity(run(mixed=mixed_arm((*LOSSES[:6], 0.9, 0.9)))))
    result = gated(now, report(training=parity()))
    assert kinds(result) == ["verdict", "check"]
    assert result.findings[0].reason == "the report's own verdict is fail: training.loss"
    (finding,) = (f for f in result.findings if f.kind is RegressionKind.CHECK)
    assert (finding.subject, finding.before, finding.after) == ("training.loss", "pass", "fail")


def test_a_training_check_that_could_not_tell_this_time_is_no_regression() -> None:
    """It may be luck, on another machine for one. Where the verdict depends on it, the gate has no
    answer either."""
    for metrics, loss, name, status in (
        ({"loss": 0.6, "accuracy": 0.9}, 0.55, "training.loss", "inconclusive"),
        ({"loss": 0.62, "accuracy": 0.9}, 0.5, "training.metrics.loss", "pass"),
    ):
        lucky = parity(run(mixed=mixed_arm((*LOSSES[:6], loss, loss), metrics=metrics)))
        result = gated(report(training=lucky), report(training=parity()))
        assert (result.status, result.findings) == (status, ())
        (note,) = (note for note in result.notes if name in note)
        assert note.startswith(f"{name} passed in the baseline and has no answer now: ")
        assert note.endswith("one pair cannot tell, --seeds can")


@pytest.mark.parametrize(
    ("training", "subject"),
    [
        (parity(steps=9, ended="interrupted after 8 of 9 steps"), "training.steps"),
        (parity(run(random_parted=1)), "training.random"),
        (
            parity(run(arm("fp32", metrics={}), mixed_arm(metrics={})), metric="train_loss"),
            "training.metric",
        ),
    ],
)
def test_a_training_check_that_did_not_run_is_found(training: TrainingParity, subject: str) -> None:
    findings = gated(report(training=training), report(training=parity())).findings
    assert subject in [finding.subject for finding in findings]
    assert {finding.kind for finding in findings} == {RegressionKind.CHECK}


def test_a_metric_after_training_that_is_another_is_no_finding() -> None:
    """As on another machine, where FP32 too has other bits."""
    other = {"loss": 0.5, "accuracy": 0.8}
    now = parity(run(arm("fp32", metrics=other), mixed_arm(metrics=other)))
    assert gated(report(training=now), report(training=parity())).status == "pass"


def test_seeds_that_are_no_longer_asked_for_are_found() -> None:
    result = gated(report(training=parity()), report(training=over_seeds()))
    assert [finding.subject for finding in result.findings] == ["training.seeds"]
