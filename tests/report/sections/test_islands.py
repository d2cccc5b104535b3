"""Rows of FP32 islands: of one kind together, the dearest first; and where they are shown."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from amp_convert.plan.costs import Island
from amp_convert.report import RunReport
from amp_convert.report.sections.audit import AuditReport, audit_report
from amp_convert.report.sections.grouping import LayerPattern
from amp_convert.report.sections.islands import IslandRow, island_rows
from amp_convert.report.writers.audit_files import audit_markdown
from amp_convert.report.writers.audit_terminal import render_audit
from amp_convert.report.writers.html_report import html_text
from amp_convert.report.writers.json_report import json_text
from amp_convert.report.writers.markdown_report import markdown_text
from tests.report.builders import HOSTILE, decision, plan_of

NORM = Island(
    layer="layers.0.norm",
    op="aten.mean",
    reason="it averages <b>",
    evidence="abs max 3",
    ops=(("aten.mean", 1), ("aten.mul", 2)),
    nodes=3,
    casts=2,
    cast_bytes=3_000,
    wider_bytes=400,
)
ISLANDS = (
    NORM,
    replace(NORM, layer="layers.1.norm", evidence="abs max 4"),
    replace(NORM, layer="head", op="aten.exp", reason="it grows", cast_bytes=9_000, casts=1),
)


def test_islands_of_one_kind_are_one_row() -> None:
    dear, norms = island_rows(ISLANDS)
    assert dear.layers == (LayerPattern("head", 1, 1),)
    assert norms == IslandRow(
        islands=2,
        layers=(LayerPattern("layers.*.norm", 2, 2),),
        keeper="aten.mean",
        ops=(("aten.mul", 4), ("aten.mean", 2)),
        reason="it averages <b>",
        evidence="abs max 3",
        nodes=6,
        casts=4,
        cast_bytes=6_000,
        wider_bytes=800,
    )
    assert island_rows(ISLANDS, most=1) == [dear]


def test_they_are_shown(small_report: RunReport) -> None:
    report = small_report
    with_islands = report.model_copy(
        update={"plan": report.plan.model_copy(update={"islands": ISLANDS})}
    )
    read = RunReport.model_validate_json(json_text(with_islands))
    assert read.plan.islands == ISLANDS
    shown = markdown_text(with_islands)
    assert "## What FP32 costs" in shown
    assert (
        "| 2 | 4 | 5.86 KiB | 800 bytes | layers.&#42;.norm (2 layers) | aten.mul ×4, aten.mean ×2 "
        "| aten.mean: it averages &#60;b&#62; | abs max 3 |"
    ) in shown
    page = html_text(with_islands)
    assert "What FP32 costs" in page
    assert "it averages &lt;b&gt;" in page
    assert "What FP32 costs" not in html_text(report) + markdown_text(report)


def test_the_audit_shows_them_too(small_report: RunReport) -> None:
    plan = replace(plan_of((decision("head"),)), islands=ISLANDS)
    report = audit_report(plan, small_report.model, "0.1.0")
    assert AuditReport.model_validate_json(json_text(report)).islands == ISLANDS
    assert "| 2 | 4 | 5.86 KiB | 800 bytes |" in audit_markdown(report)
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "What FP32 costs a call: casts at the borders of its regions" in lines
    assert "1 8.79 KiB 400 bytes head: aten.exp, with aten.mul ×2, aten.mean" in lines


def test_hostile_names_stay_text(small_report: RunReport) -> None:
    hostile = [
        replace(NORM, layer=text, op=text, reason=text, evidence=text, ops=((text, 1),))
        for text in HOSTILE
    ]
    plan = replace(plan_of((decision("head"),)), islands=tuple(hostile))
    report = audit_report(plan, small_report.model, "0.1.0")
    stream = io.StringIO()
    render_audit(Console(file=stream, width=80), report)
    for text in (stream.getvalue(), audit_markdown(report)):
        assert not any(c in text for c in "\x1b\x07\x9b\u202e")
    shown = small_report.model_copy(
        update={"plan": small_report.plan.model_copy(update={"islands": tuple(hostile)})}
    )
    assert "<script>" not in html_text(shown)
