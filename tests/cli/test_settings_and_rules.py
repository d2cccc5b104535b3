"""Rules, plans given back, and settings, by the command."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.cli.finished_run import decisions
from tests.command import (
    MLP,
    Outcome,
    amp,
    write,
)


def test_a_plan_given_back_gives_the_same_plan(done: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder = done[0]
    plan = str(folder / "reports/model/plan.toml")
    again = amp(folder, "model.py", "--rules", plan, "--out", str(tmp_path / "again"), "--json")
    assert again.code == 0
    chosen = ("dtype", "low", "input_dtypes", "output_dtype", "output_dtypes")
    rows = {row["node"]: row for row in again.json["plan"]["decisions"]}
    before = decisions(folder)
    assert rows.keys() == before.keys()
    assert {n: [row[c] for c in chosen] for n, row in rows.items()} == {
        n: [row[c] for c in chosen] for n, row in before.items()
    }
    assert again.json["plan"]["casts"] == 6


def test_an_edited_line_of_a_plan_changes_that_node_alone(
    done: tuple[Path, Outcome], tmp_path: Path
) -> None:
    folder = done[0]
    text = (folder / "reports/model/plan.toml").read_text(encoding="utf-8")
    nodes = [rule["node"] for rule in tomllib.loads(text)["rule"] if "node" in rule]
    assert nodes[:3] == list(decisions(folder))
    head, pin, tail = text.partition('node = "1/aten.relu#0"\ncategory = "allow"')
    assert pin
    write(tmp_path, head + pin.replace("allow", "deny") + tail, "mine.toml")
    out = str(tmp_path / "edited")
    outcome = amp(folder, "model.py", "--rules", f"{tmp_path}/mine.toml", "--out", out, "--json")
    rows = outcome.json["plan"]["decisions"]
    assert {row["node"]: (row["low"], row["dtype"]) for row in rows} == {
        "0/aten.linear#0": (True, "float16"),
        "1/aten.relu#0": (False, "float32"),
        "2/aten.linear#0": (True, "float16"),
    }
    assert outcome.json["plan"]["casts"] == 8


@pytest.mark.parametrize(
    "flags",
    [
        ["--rules", "half", "mine.toml"],
        ["--rules", "half", "--rules", "mine.toml"],
        ["--rules=half", "--rules=mine.toml"],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_several_rules_and_the_later_wins(flags: list[str], first: bool, tmp_path: Path) -> None:
    write(tmp_path, MLP)
    write(tmp_path, RELU_IN_FP32, "mine.toml")
    arguments = ["model.py", *flags] if first else [*flags, "model.py"]
    outcome = amp(tmp_path, "audit", *arguments, "--json")
    assert outcome.code == 0
    assert outcome.json["rules"] == ["half.toml", "mine.toml"]
    assert [row["layer"] for row in outcome.json["rows"]] == ["1"]


RELU_IN_FP32 = '[[rule]]\nlayer = "1"\ncategory = "deny"\nreason = "because"\n'


@pytest.mark.slow
def test_a_model_in_a_package(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    write(tmp_path, "", "shapes/__init__.py")
    write(tmp_path, MLP.replace("build_model", "make"), "shapes/nets.py")
    outcome = amp(tmp_path, "shapes.nets:make", "--json")
    assert outcome.code == 0
    assert outcome.json["model"]["name"] == "nets"
    assert outcome.json["model"]["source"] == "shapes.nets:make"
    assert (tmp_path / "reports/nets/report.json").exists()


@pytest.mark.slow
def test_settings_come_from_flags_then_from_pyproject(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    table = '[tool.amp-convert]\ndtype = "bfloat16"\nbatches = 2\ncalibrate = 1\nout = "mine"\n'
    write(tmp_path, table, "pyproject.toml")
    outcome = amp(tmp_path, "model.py", "--json", "--calibrate", "2")
    document = outcome.json
    assert (document["plan"]["dtype"], document["environment"]["dtype"]) == ("bfloat16",) * 2
    assert document["inference"]["batches"] == 2
    assert document["plan"]["calibration_batches"] == 2
    assert outcome.out == (tmp_path / "mine/report.json").read_text(encoding="utf-8")
    assert amp(tmp_path, "model.py", "--dtype", "float16", "--json").json["plan"]["dtype"] == (
        "float16"
    )


def test_a_tolerance_that_no_model_meets_fails(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    outcome = amp(tmp_path, "model.py", "--tolerance", "1e-9")
    assert outcome.code == 1
    assert "outputs.rel_l2" in outcome.out
