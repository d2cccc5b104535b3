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
from amp_convert.plan.plan import DecisionKind, Plan
from amp_convert.report import RunReport
from amp_convert.report.sections.audit import (
    AuditCause,
    AuditReport,
    audit_layers,
    audit_report,
    audit_rows,
)
from amp_convert.report.sections.grouping import layer_range
from amp_convert.report.writers.audit_files import (
    audit_csv,
    audit_json,
    audit_markdown,
    write_audit,
)
from amp_convert.report.writers.audit_terminal import render_audit
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


def test_golden(plan: Plan, report: AuditReport, golden: Callable[[str, str], None]) -> None:
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report, Path("reports/digits"))
    golden("audit.txt", re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE))
    golden("audit.md", audit_markdown(report))
    golden("audit.csv", audit_csv(audit_rows(plan)))


def test_layers_that_differ_in_an_index_share_a_line(small_report: RunReport) -> None:
    plan = plan_of(tuple(fp32(f"block.{i}.norm", "aten.mean", macs=1) for i in range(300)))
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), audit_report(plan, small_report.model, "0.1.0"))
    assert re.search(r"300 +100 % +block\.0 to 299\.norm", stream.getvalue())


def test_json_goes_there_and_back(report: AuditReport) -> None:
    text = audit_json(report)
    assert AuditReport.model_validate_json(text) == report
    assert json.loads(text)["rows"][0]["causes"][0]["ops"] == [["aten.mean", 2]]


def test_json_has_a_row_a_line(report: AuditReport) -> None:
    """So that what is short for people is short in a terminal that shows JSON."""
    keys = len(AuditReport.model_fields)
    assert len(audit_json(report).splitlines()) == 2 + keys + len(report.rows) + 1


def test_the_folder_holds_all_forms(plan: Plan, report: AuditReport, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    write_audit(out, report, audit_rows(plan))
    assert sorted(path.name for path in out.iterdir()) == ["audit.csv", "audit.json", "audit.md"]
    assert AuditReport.model_validate_json((out / "audit.json").read_text("utf-8")) == report
    write_audit(out, report, audit_rows(plan))


def test_hostile_names_stay_text(small_report: RunReport) -> None:
    nodes = tuple(fp32(name, name, reason=name, location=name, evidence=name) for name in HOSTILE)
    plan = plan_of(nodes)
    report = audit_report(plan, small_report.model, "0.1.0")
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    assert max(cell_len(line) for line in stream.getvalue().splitlines()) <= 80
    assert not {"\x07", "\x1b", "\u202e"} & set(stream.getvalue())
    text = io.StringIO(audit_csv(audit_rows(plan)), newline="")
    cells = [cell for row in csv.reader(text) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    table = [line for line in audit_markdown(report).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    assert {line.count("|") for line in table} == {8}


def test_a_model_that_is_all_low_has_no_rows(small_report: RunReport) -> None:
    report = audit_report(plan_of((decision("a"),)), small_report.model, "0.1.0")
    assert report.rows == ()
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    assert "No node stays FP32 (1 node in 1 layer)\n" in stream.getvalue()


def llama(layers: int) -> Plan:
    """What an RMSNorm of each layer keeps in FP32: a mean and a guard's rsqrt by rule, and what
    follows them, with reasons that name the layer."""
    nodes = []
    for i in range(layers):
        norm = f"model.layers.{i}.norm"
        mean = fp32(norm, "aten.mean")
        follows = {"kind": DecisionKind.PROPAGATION, "rule": "op aten.add", "follows": mean.node}
        guard = {"kind": DecisionKind.GUARD, "rule": "guard small-eps", "evidence": f"eps {i}e-9"}
        nodes += [
            mean,
            fp32(norm, "aten.add", reason=f"follows aten.mean in {norm}", **follows),
            fp32(norm, "aten.rsqrt", reason="an eps is lost", **guard),
            fp32(f"model.layers.{i}", "aten.mul", reason=f"follows aten.mean in {norm}", **follows),
        ]
    return plan_of(tuple(nodes))


def test_layers_that_differ_in_a_number_are_one_row() -> None:
    norm, layer = audit_layers(llama(24))
    assert (norm.layer, norm.layers, norm.nodes) == ("model.layers.0 to 23.norm", 24, 72)
    mean, add, rsqrt = norm.causes
    assert (mean.ops, mean.kind, mean.evidence) == ((("aten.mean", 24),), "rule", "")
    assert (rsqrt.ops, rsqrt.kind, rsqrt.evidence) == ((("aten.rsqrt", 24),), "guard", "eps 0e-9")
    follows = "follows aten.mean in model.layers.*.norm, which stays in FP32"
    assert (add.ops, add.reason, add.here) == ((("aten.add", 24),), follows, True)
    assert layer.layer == "model.layers.0 to 23"
    [cause] = layer.causes
    assert isinstance(cause, AuditCause)
    assert (cause.reason, cause.here) == (follows, False)


def test_more_layers_make_no_more_lines(small_report: RunReport) -> None:
    """A screen for 2 layers is a screen for 200."""

    def shown(layers: int) -> tuple[int, int]:
        report = audit_report(llama(layers), small_report.model, "0.1.0")
        stream = io.StringIO()
        render_audit(Console(file=stream, width=80), report)
        return len(stream.getvalue().splitlines()), len(audit_json(report).splitlines())

    assert max(*shown(2), *shown(200)) < 20


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ([""], "(top level)"),
        (["a.0.b"], "a.0.b"),
        (["a.0", "a.1", "a.2"], "a.0 to 2"),
        (["a.2", "a.1", "a.3"], "a.1 to 3"),
        (["a.0", "a.2"], "a.*"),
        (["a.0.b.1", "a.1.b.1"], "a.0 to 1.b.1"),
        (["a.0.b.0", "a.1.b.1"], "a.*.b.*"),
    ],
)
def test_a_name_for_many_layers(layers: list[str], name: str) -> None:
    assert layer_range(layers) == name
