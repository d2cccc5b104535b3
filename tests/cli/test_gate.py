"""`gate`, and `--baseline` on the main command: regressions made for real, and what each says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command import MLP, OVERFLOWING, amp, write

REPORT, BASELINE = "reports/model/report.json", "baselines/model.json"
RELU_IN_FP32 = 'extends = "default"\n[[rule]]\nlayer = "1"\ncategory = "deny"\nreason = "slow"\n'
LAST_IN_FP32 = RELU_IN_FP32.replace('"1"', '"2"')
WITHOUT_METRICS = MLP.partition("def metrics")[0]
# The terms that cancel are 10 times larger, so their roundings are too.
LESS_EXACT = MLP.replace("OFFSET = 0.0", "OFFSET = 10.0")
WORSE_SCORE = MLP.replace("SCORE = 1.0", "SCORE = 0.98")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its report and its baseline."""
    folder = tmp_path_factory.mktemp("gate")
    write(folder, MLP)
    assert amp(folder, "model.py").code == 0
    assert amp(folder, "gate", REPORT, "--baseline", BASELINE, "--update").code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same as `made`, for one test to change."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.slow
def test_a_report_passes_against_its_own_baseline(made: Path) -> None:
    outcome = amp(made, "gate", REPORT, "--baseline", BASELINE)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == " PASS   gate: 3 nodes compared with the baseline, 0 findings\n"
    assert amp(made, "gate", REPORT, "--baseline", REPORT).code == 0


def test_the_same_model_passes_again(folder: Path) -> None:
    outcome = amp(folder, "model.py", "--baseline", BASELINE)
    assert outcome.code == 0
    assert outcome.out.endswith(
        "Report: reports/model/report.html\n"
        " PASS   gate: 3 nodes compared with the baseline, 0 findings\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "rules", "expected"),
    [
        pytest.param(
            MLP,
            LAST_IN_FP32,
            {("newly-fp32", "2/aten.linear#0", "float16"), ("work", "multiply-adds", 1.0)},
            id="newly FP32",
        ),
        pytest.param(
            MLP,
            RELU_IN_FP32,
            {("newly-fp32", "1/aten.relu#0", "float16"), ("casts", "eval graph", 6)},
            id="casts added",
        ),
        pytest.param(WORSE_SCORE, "", {("metric", "score", 1.0)}, id="metric dropped"),
        pytest.param(
            WITHOUT_METRICS, "", {("check", "metrics.score", "pass")}, id="check no longer runs"
        ),
    ],
)
def test_each_regression_is_found(
    text: str, rules: str, expected: set[tuple[str, str, object]], folder: Path
) -> None:
    write(folder, text)
    flags = []
    if rules:
        write(folder, rules, "mine.toml")
        flags = ["--rules", "mine.toml"]
    assert amp(folder, "model.py", *flags).code == 0
    outcome = amp(folder, "gate", REPORT, "--baseline", BASELINE, "--json")
    assert (outcome.code, outcome.json["status"]) == (1, "fail")
    found = {(f["kind"], f["subject"], f["before"]) for f in outcome.json["findings"]}
    assert found == expected


@pytest.mark.slow
def test_a_larger_error_fails_unless_the_factor_allows_it(folder: Path) -> None:
    write(folder, LESS_EXACT)
    outcome = amp(folder, "model.py", "--baseline", BASELINE)
    assert outcome.code == 1
    # The report itself holds; it is the gate that says no. Both are shown, and it is written.
    assert outcome.out.startswith(" PASS   model  float16 on cpu\n")
    assert " FAIL   gate: 3 nodes compared with the baseline, " in outcome.out
    gated = amp(folder, "gate", REPORT, "--baseline", BASELINE, "--json")
    assert gated.code == 1
    findings = gated.json["findings"]
    assert {f["kind"] for f in findings} == {"error"}
    assert "0/aten.linear#0" in {f["subject"] for f in findings}
    assert all(f["after"] > 2 * f["before"] for f in findings)
    assert amp(folder, "gate", REPORT, "--baseline", BASELINE, "--factor", "1000").code == 0


def test_a_metric_may_drop_by_the_tolerance(folder: Path) -> None:
    write(folder, WORSE_SCORE)
    assert amp(folder, "model.py").code == 0
    gate = ("gate", REPORT, "--baseline", BASELINE)
    assert amp(folder, *gate, "--metric-tolerance", "0.03").code == 0
    outcome = amp(folder, *gate)
    assert outcome.code == 1
    text = " ".join(outcome.out.split())
    assert "metric score 1 -> 0.98 worse than 0.99, the limit; FP32 went from 1 to 0.98" in text


def test_a_report_that_fails_itself_fails_the_gate(folder: Path) -> None:
    assert amp(folder, "model.py", "--tolerance", "1e-9").code == 1
    outcome = amp(folder, "gate", REPORT, "--baseline", BASELINE, "--json")
    assert outcome.code == 1
    assert {f["kind"] for f in outcome.json["findings"]} == {"verdict", "check"}


@pytest.mark.slow
def test_with_json_the_gate_goes_to_stderr(folder: Path) -> None:
    write(folder, WORSE_SCORE)
    outcome = amp(folder, "model.py", "--baseline", BASELINE, "--json")
    assert outcome.code == 1
    assert outcome.out == (folder / REPORT).read_text(encoding="utf-8")
    assert " FAIL   gate: 3 nodes compared with the baseline, 1 finding\n" in outcome.err


# --update


def test_update_writes_what_the_gate_then_accepts(folder: Path) -> None:
    write(folder, WORSE_SCORE)
    assert amp(folder, "model.py").code == 0
    gate = ("gate", REPORT, "--baseline", BASELINE)
    assert amp(folder, *gate).code == 1
    updated = amp(folder, *gate, "--update")
    assert (updated.code, updated.out) == (0, f"{BASELINE} written: 3 nodes\n")
    assert amp(folder, *gate).code == 0
    baseline = json.loads((folder / BASELINE).read_text(encoding="utf-8"))
    assert baseline["metrics"]["score"]["mixed"] == 0.98
    assert [entry.name for entry in (folder / "baselines").iterdir()] == ["model.json"]


@pytest.mark.slow
def test_update_refuses_a_failing_report(folder: Path) -> None:
    before = (folder / BASELINE).read_bytes()
    write(folder, OVERFLOWING)
    assert amp(folder, "model.py", "--rules", "half").code == 1
    outcome = amp(folder, "gate", REPORT, "--baseline", BASELINE, "--update")
    assert outcome.code == 2
    assert outcome.error == (
        "a report whose verdict is fail cannot become a baseline. "
        "Mend what it found, run again, then update."
    )
    assert (folder / BASELINE).read_bytes() == before


def test_update_spares_a_file_that_is_no_baseline(folder: Path) -> None:
    write(folder, '{"mine": 1}', "mine.json")
    outcome = amp(folder, "gate", REPORT, "--baseline", "mine.json", "--update")
    assert (outcome.code, outcome.error) == (
        2,
        "mine.json is not a baseline, so it is not overwritten. "
        "Choose another path, or remove that file.",
    )
    assert (folder / "mine.json").read_text(encoding="utf-8") == '{"mine": 1}'


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ("none.json --baseline baselines/model.json", "there is no report at none.json."),
        (f"{REPORT} --baseline none.json", "there is no baseline at none.json."),
        (f"{BASELINE} --baseline {BASELINE}", f"{BASELINE} is a baseline, not a report."),
        (f"{REPORT} --baseline {BASELINE} --factor 0.5", "the factor is 0.5."),
        (REPORT, "Missing option '--baseline'. See amp-convert gate --help."),
        (f"{REPORT} --basline {BASELINE}", "there is no flag --basline. Did you mean --baseline?"),
    ],
)
def test_a_wrong_call(arguments: str, start: str, made: Path) -> None:
    outcome = amp(made, "gate", *arguments.split())
    assert outcome.code == 2
    assert outcome.error.startswith(start)
