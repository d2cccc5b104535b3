"""The main job on the command line: verdict, report folder, exit codes, rules and settings."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from amp_convert import __version__
from tests.cli.finished_run import STAGES, decisions
from tests.command import (
    BRANCH,
    CNN,
    MLP,
    OVERFLOWING,
    Outcome,
    amp,
    net,
    write,
)

FILES = {"report.json", "layers.csv", "plan.toml", "report.md", "report.html", "junit.xml"}


# The columns that the design promises, in its order.
COLUMNS = (
    "node,layer,op,dtype,rule,reason,source,local_rel_l2,accumulated_rel_l2,sqnr_db,cosine,"
    "max_abs_err,max_ulp,nonfinite,overflow_fraction,underflow_fraction,"
    "grad_rel_l2,grad_cosine,grad_underflow_fraction,"
    "onnx_ops,onnx_ran,onnx_local_rel_l2,onnx_accumulated_rel_l2,output_rel_l2,error_share"
)


@pytest.fixture(scope="module")
def report(done: tuple[Path, Outcome]) -> dict[str, Any]:
    text = (done[0] / "reports/model/report.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def test_a_model_that_holds_passes(done: tuple[Path, Outcome]) -> None:
    folder, outcome = done
    assert outcome.code == 0
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert lines[0] == " PASS   model  float16 on cpu"
    # One more where this machine has fast FP16, and the model is faster for it.
    counts = ("19 of 23 checks passed, 4 not checked", "20 of 23 checks passed, 3 not checked")
    assert lines[1].partition(";")[0] in counts or "slower than FP32" in lines[1]
    assert lines[1].endswith("; rules default.toml")
    assert "  low precision  3 of 3 nodes (100 %), 100 % of the multiply-adds" in lines
    assert lines[-1] == "Report: reports/model/report.html"
    assert {entry.name for entry in folder.iterdir()} == {"model.py", "reports"}


def test_progress_goes_to_stderr_and_the_result_to_stdout(done: tuple[Path, Outcome]) -> None:
    outcome = done[1]
    assert outcome.err.splitlines() == STAGES
    assert not any(stage in outcome.out for stage in STAGES)


def test_without_a_terminal_there_is_no_colour_and_no_long_line(done: tuple[Path, Outcome]) -> None:
    outcome = done[1]
    assert "\x1b" not in outcome.out + outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_the_folder_holds_the_six_files(done: tuple[Path, Outcome]) -> None:
    assert {entry.name for entry in (done[0] / "reports/model").iterdir()} == FILES
    assert [entry.name for entry in (done[0] / "reports").iterdir()] == ["model"]


def test_the_report_follows_the_published_schema(report: dict[str, Any]) -> None:
    schema = json.loads(files("amp_convert.report").joinpath("report.schema.json").read_bytes())
    assert list(Draft202012Validator(schema).iter_errors(report)) == []
    assert (report["schema_version"], report["amp_convert"]) == (1, __version__)
    assert report["verdict"]["status"] == "pass"
    assert report["inference"]["metrics"][0]["mixed"] == 1.0
    assert (report["training"]["status"], report["onnx"]["status"]) == ("unchecked", "unchecked")


def test_layers_csv_has_a_row_a_node(done: tuple[Path, Outcome], report: dict[str, Any]) -> None:
    with (done[0] / "reports/model/layers.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert ",".join(reader.fieldnames or ()) == COLUMNS
    assert [row["node"] for row in rows] == ["0/aten.linear#0", "1/aten.relu#0", "2/aten.linear#0"]
    measured = {row["node"]: row for row in report["inference"]["nodes"]}
    for row in rows:
        assert 0 < float(row["accumulated_rel_l2"]) < 2e-3
        assert float(row["local_rel_l2"]) == measured[row["node"]]["local_rel_l2"]


def test_junit_has_a_test_a_check(done: tuple[Path, Outcome], report: dict[str, Any]) -> None:
    suite = ET.parse(done[0] / "reports/model/junit.xml").getroot()[0]
    checks = report["verdict"]["checks"]
    assert [case.get("name") for case in suite] == [check["name"] for check in checks]
    assert suite.get("failures") == "0"
    assert suite.get("skipped") in ("3", "4")  # performance.inference, where FP16 is fast


@pytest.mark.slow
def test_batch_norm_is_captured_in_both_modes(tmp_path: Path) -> None:
    write(tmp_path, CNN, "cnn.py")
    outcome = amp(tmp_path, "cnn.py", "--json", "--dtype", "bfloat16")
    assert (outcome.code, outcome.json["plan"]["dtype"]) == (0, "bfloat16")
    assert [
        (row["mode"], row["status"], row["outputs"], row["gradients"])
        for row in outcome.json["fidelity"]
    ] == [("eval", "identical", True, True), ("train", "identical", True, True)]
    assert outcome.json["fidelity"][1]["buffers"] is True
    assert {entry.name for entry in (tmp_path / "reports/cnn").iterdir()} == FILES


@pytest.mark.slow
def test_json_is_the_report_and_nothing_else(tmp_path: Path) -> None:
    printing = net("print('from forward')\n        return self.a(x)")
    write(tmp_path, "print('from the file')\n" + printing)
    outcome = amp(tmp_path, "model.py", "--json", "--out", "here")
    assert outcome.code == 0
    assert outcome.out == (tmp_path / "here/report.json").read_text(encoding="utf-8")
    assert outcome.json["verdict"]["status"] == "pass"
    assert "from the file" in outcome.err
    assert "from forward" in outcome.err
    assert not (tmp_path / "reports").exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_old_report_whole(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    assert amp(tmp_path, "model.py").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "reports/model").iterdir()}
    write(
        tmp_path,
        MLP.replace('return {"score": SCORE if', 'return target.shape, {"score": SCORE if'),
    )
    assert amp(tmp_path, "model.py").error == (
        "metrics() raised AttributeError: 'NoneType' object has no attribute 'shape' "
        "(at model.py:25). Correct it there; --debug shows the traceback."
    )
    after = {path.name: path.read_bytes() for path in (tmp_path / "reports/model").iterdir()}
    assert after == before
    assert [entry.name for entry in (tmp_path / "reports").iterdir()] == ["model"]


@pytest.mark.slow
def test_an_interrupt_ends_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    interrupting = MLP.replace(
        "    for seed in range(3):", "    raise KeyboardInterrupt\n    if 0:"
    )
    write(tmp_path, interrupting)
    outcome = amp(tmp_path, "model.py")
    assert (outcome.code, outcome.error) == (130, "interrupted")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.py"]


def test_overflow_fails_with_1_and_still_writes_the_report(tmp_path: Path) -> None:
    write(tmp_path, OVERFLOWING)
    outcome = amp(tmp_path, "model.py", "--rules", "half")
    assert outcome.code == 1
    assert outcome.out.startswith(" FAIL   model  float16 on cpu\n")
    lines = [line.strip() for line in outcome.out.splitlines()]
    assert lines[lines.index("Failed checks") + 1] == "outputs.finite  27, limit 0"
    text = (tmp_path / "reports/model/report.json").read_text(encoding="utf-8")
    assert json.loads(text)["verdict"]["status"] == "fail"


def test_the_guards_keep_the_same_model_from_overflowing(tmp_path: Path) -> None:
    write(tmp_path, OVERFLOWING)
    assert amp(tmp_path, "model.py").code == 0
    assert decisions(tmp_path)["/aten.mul#0"]["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "why"),
    [
        ("return self.a(x) * 0", "every FP32 output is zero"),
        (
            "return self.a(x).masked_fill(torch.arange(8) > 5, float('-inf'))",
            "8 of 32 elements are NaN or infinite in FP32 already",
        ),
    ],
)
def test_what_cannot_be_judged_is_inconclusive_with_3(
    forward: str, why: str, tmp_path: Path
) -> None:
    write(tmp_path, net(forward))
    outcome = amp(tmp_path, "model.py")
    assert outcome.code == 3
    assert outcome.out.startswith(" INCONCLUSIVE   model  float16 on cpu\n")
    before, _, section = outcome.out.partition("Inconclusive, since these were not checked\n")
    verdict = " ".join(before.split())
    assert "float16 on cpu undecided by outputs." in verdict
    assert why in verdict
    assert why in " ".join(section.partition("\n\n")[0].split())
    assert (tmp_path / "reports/model/report.json").exists()


def test_a_model_that_cannot_be_captured_is_unsupported_with_4(tmp_path: Path) -> None:
    weight = net(BRANCH.replace("self.a(x)", "(x @ self.w)")).replace(
        "self.a = nn.Linear(8, 8)", "self.w = nn.Parameter(torch.ones(8, 8))"
    )
    write(tmp_path, weight)
    outcome = amp(tmp_path, "model.py")
    assert outcome.code == 4
    assert outcome.error.startswith("no part of the model can be captured: ")
    assert outcome.error.endswith(
        "(at model.py:10). Use torch.where or torch.cond there, or move that code out of the model."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.py"]
