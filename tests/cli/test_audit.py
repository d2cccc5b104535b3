"""`audit`: which layers stay FP32 and why, without a conversion."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.command import MLP, amp, net, write

PROBE = net("return torch.linalg.vector_norm(self.a(x), dim=1)")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write(folder, PROBE, "probe.py")
    return folder


@pytest.mark.slow
def test_the_table_says_which_and_why(probe: Path) -> None:
    outcome = amp(probe, "audit", "probe.py")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    assert text.startswith(
        "Audit of probe float16 on cpu, rules default.toml "
        "1 of 2 nodes in 1 of 2 layers stay FP32, with 0 % of the multiply-adds "
        "nodes mul-adds layer, what, why 1 0 % (top level) probe.py:10 aten.linalg_vector_norm: "
    )
    assert "[default.toml:" in text
    assert "probe.py:10" in text
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "\x1b" not in outcome.out
    assert outcome.err.splitlines()[-1] == "plan ..."
    assert "compare with FP32 ..." not in outcome.err
    assert [entry.name for entry in probe.iterdir()] == ["probe.py"]


def test_json_and_out_say_the_same(probe: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    outcome = amp(probe, "audit", "probe.py", "--json", "--out", str(out))
    assert outcome.out == (out / "audit.json").read_text(encoding="utf-8")
    assert {entry.name for entry in out.iterdir()} == {"audit.json", "audit.csv", "audit.md"}
    (row,) = outcome.json["rows"]
    [cause] = row["causes"]
    assert (row["layer"], row["layers"], row["nodes"]) == ("(top level)", 1, 1)
    assert (cause["ops"], cause["kind"]) == ([["aten.linalg_vector_norm", 1]], "rule")
    assert row["location"] == "probe.py:10"
    assert cause["source"].startswith("default.toml:")
    assert outcome.json["totals"]["fp32_nodes"] == 1
    with (out / "audit.csv").open(encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["rule"], line["reason"]) == (cause["rule"], cause["reason"])
    assert line["evidence"].startswith("abs max ")
    assert cause["reason"].split(":")[0] in (out / "audit.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_folder_is_named_at_the_end(probe: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    assert amp(probe, "audit", "probe.py", "--out", str(out)).out.endswith(
        f"\nAudit: {out}/audit.md\n"
    )


@pytest.mark.slow
def test_nothing_stays_fp32(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    lines = [line.rstrip() for line in amp(tmp_path, "audit", "model.py").out.splitlines()]
    assert lines == [
        "Audit of model  float16 on cpu, rules default.toml",
        "No node stays FP32 (3 nodes in 3 layers)",
        "",
    ]


@pytest.mark.slow
def test_the_audit_and_the_conversion_plan_alike(tmp_path: Path) -> None:
    write(tmp_path, PROBE)
    flags = ["model.py", "--dtype", "bfloat16", "--json"]
    audit = amp(tmp_path, "audit", *flags).json
    report = amp(tmp_path, *flags, "--out", "report").json
    kept = [row for row in report["plan"]["decisions"] if row["category"] != "none"]
    kept = [row for row in kept if not row["low"]]
    assert kept
    assert audit["totals"]["fp32_nodes"] == len(kept) == sum(row["nodes"] for row in audit["rows"])
    assert audit["totals"]["casts"] == report["plan"]["casts"]
    assert audit["totals"]["share_macs_low"] == report["plan"]["share_macs_low"]
    named = {row["layer"] or "(top level)" for row in kept}
    assert {row["layer"] for row in audit["rows"]} == named
    assert json.dumps(audit["model"]) == json.dumps(report["model"])
