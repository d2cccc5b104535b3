"""The result on the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from amp_convert.report import RunReport
from amp_convert.report.writers.terminal import render
from amp_convert.verdict.verdict import Verdict
from tests.report.builders import fp32, plan_section


def _printed(report: RunReport, folder: Path | None = None, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=80, **options)  # type: ignore[arg-type]
    render(console, report, folder)
    return stream.getvalue()


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    text = _printed(small_report, Path("reports/digits"))
    golden("terminal.txt", re.sub(r" +$", "", text, flags=re.MULTILINE))


def test_a_transformer_fits_a_screen(
    make_report: Callable[[int], RunReport], golden: Callable[[str, str], None]
) -> None:
    text = _printed(make_report(120), Path("reports/bert"))
    golden("terminal_large.txt", re.sub(r" +$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["hostile", "large"])
def test_nothing_is_wider_than_80_columns(
    name: str, hostile_report: RunReport, make_report: Callable[[int], RunReport]
) -> None:
    report = hostile_report if name == "hostile" else make_report(300)
    lines = _printed(report).splitlines()
    assert max(cell_len(line) for line in lines) <= 80
    assert len(lines) < 235


def test_a_long_path_is_not_broken(small_report: RunReport) -> None:
    folder = Path("/tmp") / ("deep/" * 40)
    assert f"Report: {folder}/report.html\n" in _printed(small_report, folder)


def test_names_are_neither_markup_nor_control_characters(hostile_report: RunReport) -> None:
    text = _printed(hostile_report, force_terminal=True, color_system="truecolor")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert "\u202e" not in plain
    assert "[red]markup[/red]" in plain


@pytest.mark.parametrize(
    ("status", "colour"), [("pass", "32"), ("fail", "31"), ("inconclusive", "33")]
)
def test_the_verdict_comes_first_in_its_colour(
    small_report: RunReport, status: str, colour: str
) -> None:
    verdict = Verdict(status, small_report.verdict.checks)  # type: ignore[arg-type]
    report = small_report.model_copy(update={"verdict": verdict})
    text = _printed(report, force_terminal=True, color_system="standard")
    assert text.startswith(f"\x1b[1;7;{colour}m {status.upper()} \x1b[0m")


def test_no_colour_when_not_a_terminal(small_report: RunReport) -> None:
    assert "\x1b" not in _printed(small_report)


def test_no_color_is_honoured(small_report: RunReport) -> None:
    text = _printed(small_report, force_terminal=True, no_color=True)
    codes = {code for codes in re.findall(r"\x1b\[([0-9;]*)m", text) for code in codes.split(";")}
    assert codes <= {"", "0", "1", "2", "7"}


def test_many_reasons_are_cut_and_counted(small_report: RunReport) -> None:
    nodes = tuple(fp32(f"layer{i}", "aten.exp", reason=f"reason {i}") for i in range(11))
    text = _printed(small_report.model_copy(update={"plan": plan_section(nodes)}))
    assert "reason 7" in text
    assert "reason 8" not in text
    assert "... and 3 more reasons in layers.csv" in text


def test_the_frozen_arm_is_shown_only_when_it_ran(small_report: RunReport) -> None:
    assert "frozen" in _printed(small_report)
    inference = small_report.inference
    assert inference is not None
    report = small_report.model_copy(
        update={"inference": replace(inference, costs=inference.costs[:3])}
    )
    assert "frozen" not in _printed(report)


def test_a_report_without_inference(small_report: RunReport) -> None:
    text = _printed(small_report.model_copy(update={"inference": None}))
    assert "worst layers" not in text
    assert "low precision  2 of 5 nodes (40.0 %), 100 % of the multiply-adds" in text
