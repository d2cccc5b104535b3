"""The audit: which layers stay FP32, and why."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from amp_convert.capture.captured import Uncaptured
from amp_convert.plan.plan import Plan
from amp_convert.report import RunReport
from amp_convert.report.sections.audit import (
    AuditReport,
    audit_csv,
    audit_markdown,
    audit_report,
    audit_rows,
    write_audit,
)
from amp_convert.report.writers.audit_terminal import render_audit
from amp_convert.report.writers.json_report import json_text
from tests.report.builders import HOSTILE, decision, fp32, plan_of


@pytest.fixture
def plan() -> Plan:
    exp = {"rule": "op aten.exp", "reason": "overflows", "source": "default.toml:7"}
    return plan_of(
        (
            decision("block.0.fc", macs=600),
            fp32("block.0.norm", "aten.mean"),
            fp32("block.0.norm", "aten.exp", **exp),
            fp32("block.0.norm", "aten.exp", node="block.0.norm/aten.exp#1", **exp),
            fp32("block.0.norm", "aten.exp", evidence="abs max 12", macs=100, **exp),
            fp32("block.1.norm", "aten.mean", macs=300),
            fp32("", "aten.lt", category="clear", dtype="bool", rule="painting border"),
            fp32("", "aten.frob", category="unknown", rule="unknown op", reason="in no rule"),
            fp32("", "aten.argmax", category="none", dtype="int64"),
        ),
        (Uncaptured("head", "a branch on a value", "model.py:50"),),
    )


@pytest.fixture
def report(plan: Plan, small_report: RunReport) -> AuditReport:
    return audit_report(plan, small_report.model, "0.1.0")


def test_rows_are_a_layer_and_a_reason(plan: Plan) -> None:
    rows = audit_rows(plan)
    assert [(row.layer, row.ops, row.nodes, row.evidence, row.macs_share) for row in rows] == [
        ("block.0.norm", (("aten.mean", 1),), 1, "", 0.0),
        ("block.0.norm", (("aten.exp", 2),), 2, "", 0.0),
        ("block.0.norm", (("aten.exp", 1),), 1, "abs max 12", 0.1),
        ("block.1.norm", (("aten.mean", 1),), 1, "", 0.3),
        ("", (("aten.lt", 1),), 1, "", 0.0),
        ("", (("aten.frob", 1),), 1, "", 0.0),
    ]
    assert (rows[1].rule, rows[1].source, rows[1].location) == (
        "op aten.exp",
        "default.toml:7",
        "model.py:41",
    )
    assert rows[4].dtype == "bool"


def test_every_decided_node_is_low_or_in_one_row(plan: Plan, report: AuditReport) -> None:
    low = sum(node.low for node in plan.eval)
    assert low + sum(row.nodes for row in report.rows) == report.totals.nodes == 8
    assert (report.totals.fp32_nodes, report.totals.layers, report.totals.fp32_layers) == (7, 4, 3)
    assert report.totals.share_macs_low == 0.6
    assert report.unknown_ops == {"aten.frob": 1}


def test_golden(report: AuditReport, golden: Callable[[str, str], None]) -> None:
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report, Path("reports/digits"))
    golden("audit.txt", re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE))
    golden("audit.md", audit_markdown(report))
    golden("audit.csv", audit_csv(report))


def test_layers_that_differ_in_an_index_share_a_line(small_report: RunReport) -> None:
    plan = plan_of(tuple(fp32(f"block.{i}.norm", "aten.mean", macs=1) for i in range(300)))
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), audit_report(plan, small_report.model, "0.1.0"))
    assert re.search(r"300 +100 % +block\.\*\.norm \(300 layers\)", stream.getvalue())


def test_json_goes_there_and_back(report: AuditReport) -> None:
    text = json_text(report)
    assert AuditReport.model_validate_json(text) == report
    assert json.loads(text)["rows"][1]["ops"] == [["aten.exp", 2]]


def test_the_folder_holds_all_forms(report: AuditReport, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    write_audit(out, report)
    assert sorted(path.name for path in out.iterdir()) == ["audit.csv", "audit.json", "audit.md"]
    assert AuditReport.model_validate_json((out / "audit.json").read_text("utf-8")) == report
    write_audit(out, report)


def test_hostile_names_stay_text(small_report: RunReport) -> None:
    nodes = tuple(fp32(name, name, reason=name, location=name, evidence=name) for name in HOSTILE)
    report = audit_report(plan_of(nodes), small_report.model, "0.1.0")
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    assert max(cell_len(line) for line in stream.getvalue().splitlines()) <= 80
    assert not {"\x07", "\x1b", "\u202e"} & set(stream.getvalue())
    cells = [c for row in csv.reader(io.StringIO(audit_csv(report), newline="")) for c in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    table = [line for line in audit_markdown(report).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    assert {line.count("|") for line in table} == {9}


def test_a_model_that_is_all_low_has_no_rows(small_report: RunReport) -> None:
    report = audit_report(plan_of((decision("a"),)), small_report.model, "0.1.0")
    assert report.rows == ()
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    assert "No node stays FP32 (1 node in 1 layer)\n" in stream.getvalue()
