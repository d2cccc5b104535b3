"""report.md: what it says, and that names from a model stay text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from amp_convert.report import RunReport
from amp_convert.report.text import printable
from amp_convert.report.writers.markdown import code, escape, table
from amp_convert.report.writers.markdown_report import markdown_text
from tests.report.builders import HOSTILE


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    golden("report.md", markdown_text(small_report))


@given(st.text())
def test_escaped_prose_shows_as_it_is_and_holds_no_markup(text: str) -> None:
    escaped = escape(text)
    assert html.unescape(escaped) == printable(text)
    assert not set("<>`*[]|~\\\n") & set(escaped)
    assert not re.search(r"&(?!#\d+;)", escaped)
    assert "://" not in escaped
    assert "@" not in escaped


@given(st.text())
def test_a_name_in_code_type_cannot_end_its_code(text: str) -> None:
    shown = code(text)
    if shown.startswith("`"):
        assert shown == f"`{printable(text)}`"
        assert not set("`|\\\n") & set(shown[1:-1])
    elif shown:
        assert shown.startswith("<code>")
        assert shown.endswith("</code>")
        inner = shown.removeprefix("<code>").removesuffix("</code>")
        assert html.unescape(inner) == printable(text)
        assert not set("<>`*_[]|~\\\n") & set(inner)
    else:
        assert text == ""


def test_a_hostile_name_stays_in_its_cell(hostile_report: RunReport) -> None:
    text = markdown_text(hostile_report)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 14
    for rows in blocks:
        assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", text)


def test_every_hostile_check_is_shown(hostile_report: RunReport) -> None:
    shown = html.unescape(markdown_text(hostile_report))
    for name in HOSTILE:
        assert f"| **FAIL** | {printable(name)} |" in shown


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["a", "b"], [["x", "1"]], numbers="1") == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
    ]


def test_a_report_without_inference_or_fp32_nodes(small_report: RunReport) -> None:
    plan = small_report.plan.model_copy(update={"decisions": ()})
    report = small_report.model_copy(update={"inference": None, "plan": plan})
    text = markdown_text(report)
    assert "Nothing: every node computes in low precision." in text
    assert "Worst layers" not in text
