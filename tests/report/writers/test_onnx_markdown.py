"""The ONNX section of report.md."""

from __future__ import annotations

import html
from collections.abc import Callable

from amp_convert.report import RunReport
from amp_convert.report.sections.onnx_summary import onnx_summary
from amp_convert.report.text import printable
from amp_convert.report.writers.markdown_report import markdown_text
from amp_convert.report.writers.onnx_markdown import onnx_lines
from tests.report.builders import HOSTILE
from tests.report.exported import clean_parity, hostile_section, section


def _text(report: RunReport, onnx: object) -> str:
    return "\n".join(onnx_lines(onnx_summary(report.model_copy(update={"onnx": onnx})))) + "\n"


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    golden("onnx.md", _text(small_report, section()))


def test_a_file_that_is_right_has_neither_metrics_nor_worst_nodes(small_report: RunReport) -> None:
    text = _text(small_report, section(**clean_parity()))
    assert sum(line.startswith("| ---") for line in text.splitlines()) == 1
    assert text.endswith(
        "\n- first to part: none\n- first to drift: none\n- first in float32: none\n"
    )


def test_without_an_export_there_is_no_section(small_report: RunReport) -> None:
    assert onnx_lines(None) == []
    assert "## ONNX" not in markdown_text(small_report)


def test_the_report_has_the_section(exported_report: RunReport) -> None:
    assert _text(exported_report, exported_report.onnx) in markdown_text(exported_report)


def test_hostile_text_stays_text(small_report: RunReport) -> None:
    text = _text(small_report, hostile_section())
    shown = html.unescape(text)
    for name in HOSTILE:
        assert shown.count(printable(name)) >= 3
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for rows in tables:
        assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "<script>" not in text.replace("`<script>alert(1)</script>`", "")
