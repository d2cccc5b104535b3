"""Baselines survive their file, and no damaged file ever passes for one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.gate.baseline import (
    baseline_of,
    baseline_text,
    load_baseline,
    load_report,
    write_baseline,
)
from amp_convert.gate.regressions import RegressionKind
from amp_convert.report.writers.json_report import json_text
from tests.evidence import (
    DECISIONS,
    FIRST,
    LAST,
    SOFTMAX,
    divergence,
    gated,
    in_fp32,
    measured,
    node_error,
    output,
    report,
)
from tests.training_evidence import parity

NAN = math.nan


@pytest.fixture
def baseline_file(tmp_path: Path) -> Path:
    """A baseline as --update writes it."""
    path = tmp_path / "digits.json"
    write_baseline(report(), path)
    return path


def test_a_baseline_survives_its_file(baseline_file: Path) -> None:
    assert load_baseline(baseline_file) == baseline_of(report())


def test_the_file_is_reviewable_and_holds_nothing_of_one_machine(baseline_file: Path) -> None:
    text = baseline_file.read_text()
    assert json.loads(text)["kind"] == "baseline"
    lines = [line for line in text.splitlines() if "aten." in line]
    assert lines == [
        f'    "{FIRST}": {{"accumulated_rel_l2": 0.002, "dtype": "float16", '
        '"layer": "encoder.0", "local_rel_l2": 0.001, "low": true, "place": 0},',
        f'    "{SOFTMAX}": {{"accumulated_rel_l2": 0.002, "dtype": "float32", '
        '"layer": "encoder.1", "local_rel_l2": null, "low": false, "place": 1},',
        f'    "{LAST}": {{"accumulated_rel_l2": 0.002, "dtype": "float16", '
        '"layer": "head", "local_rel_l2": 0.001, "low": true, "place": 2}',
    ]
    for private in ("/home", "2026", "x86_64", "sha256"):
        assert private not in text


def test_numbers_keep_four_significant_digits_and_the_same_text_results() -> None:
    noisy = measured(node_error(LAST, local_rel_l2=1.23456789e-3))
    noisier = measured(node_error(LAST, local_rel_l2=1.23456111e-3))
    assert baseline_of(noisy).nodes[LAST].local_rel_l2 == 1.235e-3
    assert baseline_text(baseline_of(noisy)) == baseline_text(baseline_of(noisier))


def test_of_training_a_baseline_keeps_statuses_and_steps() -> None:
    """No metric after training: on another machine it is another, which is no regression."""
    found = baseline_of(report(training=parity()))
    assert found.training_steps == 8
    assert found.metrics.keys() == {"accuracy"}
    assert {n: s for n, s in found.checks.items() if n.startswith("training")} == {
        "training.steps": "pass",
        "training.sound": "pass",
        "training.learnt": "pass",
        "training.random": "pass",
        "training.gradients": "pass",
        "training.weights": "pass",
        "training.loss": "pass",
        "training.metric": "pass",
        "training.metrics.loss": "pass",
    }
    assert baseline_of(report()).training_steps is None


def test_a_baseline_from_before_there_was_training_is_read(baseline_file: Path) -> None:
    document = json.loads(baseline_file.read_text())
    del document["training_steps"]
    baseline_file.write_text(json.dumps(document))
    assert load_baseline(baseline_file) == baseline_of(report())


@pytest.mark.parametrize("name", ["digits_cnn", "minilm"])
def test_the_committed_baselines_are_read(name: str) -> None:
    path = Path(__file__).parents[2] / "reports" / "baselines" / f"{name}.json"
    assert load_baseline(path).nodes


def test_integer_nodes_are_left_out() -> None:
    argmax = in_fp32("/aten.argmax#0", category="none", dtype="int64")
    assert argmax.node not in baseline_of(report(decisions=(*DECISIONS, argmax))).nodes


def test_a_full_report_serves_as_a_baseline(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json_text(report()))
    assert load_baseline(path) == baseline_of(report())
    assert load_report(path) == report()


def test_nan_survives_the_report_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json_text(measured(node_error(LAST, local_rel_l2=NAN))))
    (finding,) = (f for f in gated(load_report(path)).findings if f.kind is RegressionKind.ERROR)
    assert (finding.subject, finding.reason) == (LAST, "its local error is NaN")


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """A change to the parsed JSON, as one to its text."""

    def apply(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not a baseline: .*truncated"),
        (lambda text: "", "is not a baseline: .*truncated"),
        (lambda text: "[" * 100_000, "is not a baseline: .*truncated"),
        (lambda text: "[]", "is not a baseline: it holds no JSON object"),
        (lambda text: "{}", "is not a baseline: it has no schema_version"),
        (damaged(lambda d: d.update(schema_version=2)), "has schema version 2, .* version 1"),
        (damaged(lambda d: d.update(schema_version=True)), "has schema version True"),
        (damaged(lambda d: d.update(kind="thresholds")), "is neither a baseline nor a report"),
        (damaged(lambda d: d.pop("kind")), "is neither a baseline nor a report"),
        (damaged(lambda d: d.update(extra=1)), "extra: Extra inputs are not permitted"),
        (damaged(lambda d: d.pop("checks")), "checks: Field required"),
        (damaged(lambda d: d["nodes"][LAST].pop("low")), r"nodes\.head/.*low: Field required"),
        (damaged(lambda d: d["checks"].update(training="skip")), r"checks\.training: Input"),
    ],
    ids=[
        "half",
        "empty",
        "deep",
        "list",
        "no-version",
        "newer-version",
        "true-version",
        "other-kind",
        "no-kind",
        "unknown-key",
        "no-checks",
        "no-low",
        "unknown-status",
    ],
)
def test_a_damaged_baseline_is_an_error(
    baseline_file: Path, damage: Callable[[str], str], message: str
) -> None:
    baseline_file.write_text(damage(baseline_file.read_text()))
    with pytest.raises(UsageError, match=message) as error:
        load_baseline(baseline_file)
    assert str(baseline_file) in str(error.value)
    assert error.value.exit_code == 2


def test_no_truncated_baseline_loads(baseline_file: Path) -> None:
    text = baseline_file.read_text()
    for length in range(0, len(text) - 1, 31):
        baseline_file.write_text(text[:length])
        with pytest.raises(UsageError, match="is not a baseline"):
            load_baseline(baseline_file)


def test_a_missing_baseline_says_how_to_write_one(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(UsageError) as error:
        load_baseline(path)
    assert str(error.value) == f"there is no baseline at {path}. Run with --update to write it."


def test_a_folder_and_bytes_are_not_baselines(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the baseline"):
        load_baseline(tmp_path)
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not a baseline: it is not UTF-8 text"):
        load_baseline(path)


def test_a_baseline_is_not_a_report(baseline_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a baseline, not a report"):
        load_report(baseline_file)
    with pytest.raises(UsageError, match="there is no report at"):
        load_report(tmp_path / "report.json")


def test_a_report_with_unknown_keys_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(damaged(lambda d: d["plan"].update(extra=1))(json_text(report())))
    with pytest.raises(UsageError, match=r"not a valid report: plan\.extra: Extra inputs"):
        load_report(path)


@pytest.mark.parametrize(
    "inference",
    [divergence(outputs=(output(rel_l2=0.5),)), divergence(outputs=())],
    ids=["fail", "inconclusive"],
)
def test_only_a_passing_report_becomes_a_baseline(tmp_path: Path, inference: Any) -> None:
    bad = report(inference=inference)
    path = tmp_path / "digits.json"
    with pytest.raises(UsageError, match=f"verdict is {bad.verdict.status} cannot become"):
        write_baseline(bad, path)
    assert list(tmp_path.iterdir()) == []


def test_update_replaces_a_baseline_and_leaves_nothing_else(baseline_file: Path) -> None:
    write_baseline(report(casts=7), baseline_file)
    assert load_baseline(baseline_file).casts == 7
    assert list(baseline_file.parent.iterdir()) == [baseline_file]


def test_update_replaces_a_baseline_of_another_schema_version(baseline_file: Path) -> None:
    baseline_file.write_text(
        damaged(lambda d: d.update(schema_version=0))(baseline_file.read_text())
    )
    write_baseline(report(), baseline_file)
    assert load_baseline(baseline_file) == baseline_of(report())


def test_update_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "baselines" / "digits.json"
    assert write_baseline(report(), path) == load_baseline(path)


@pytest.mark.parametrize("content", ['{"kind": "other"}', "model = 1\n"])
def test_update_never_overwrites_a_file_that_is_no_baseline(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.py"
    path.write_text(content)
    with pytest.raises(UsageError, match="is not a baseline"):
        write_baseline(report(), path)
    assert path.read_text() == content


def test_update_never_overwrites_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json_text(report()))
    with pytest.raises(UsageError, match="is not a baseline, so it is not overwritten"):
        write_baseline(report(), path)


def test_a_failed_update_leaves_the_old_baseline_whole(
    baseline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = baseline_file.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device"):
        write_baseline(report(casts=7), baseline_file)
    assert baseline_file.read_text() == before
    assert list(baseline_file.parent.iterdir()) == [baseline_file]
