"""The ONNX section on the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console

from amp_convert.report import RunReport
from amp_convert.report.writers.terminal import render
from amp_convert.verdict.onnx_checks import converted_check
from tests.report.exported import (
    clean_parity,
    fp32_run,
    hostile_section,
    output,
    run,
    section,
)


def _section(report: RunReport, onnx: object, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=80, **options)  # type: ignore[arg-type]
    render(console, report.model_copy(update={"onnx": onnx}), None)
    text = re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)
    return text[text.index("ONNX") : text.index("Stays FP32")]


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    golden("onnx.txt", _section(small_report, section()))


def test_a_file_that_is_right_takes_few_lines(small_report: RunReport) -> None:
    lines = _section(small_report, section(**clean_parity())).splitlines()
    assert lines[-4:] == [
        "  first to part     none",
        "  first to drift    none",
        "  first in float32  none",
        "",
    ]
    assert len(lines) == 16
    assert not any("metric" in line for line in lines)


def test_hostile_text_neither_drives_the_terminal_nor_widens_it(small_report: RunReport) -> None:
    text = _section(small_report, hostile_section())
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert len(text.splitlines()) < 60
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[red]markup[/red]" in text


def test_a_run_that_does_not_agree_stands_out(small_report: RunReport) -> None:
    text = _section(small_report, section(), force_terminal=True, color_system="standard")
    assert len(re.findall(r"\x1b\[1;31mno *\x1b\[0m", text)) == 1
    assert len(re.findall(r"\x1b\[32myes *\x1b\[0m", text)) == 2


def test_a_run_that_the_verdict_excuses_is_not_red(small_report: RunReport) -> None:
    """Beyond its limit, but with a node that is known to part: unchecked."""
    apart = run("optimised", output(0.04, agrees=False))
    by_hand = run("node by node", output(0.0), batches=1)
    excused = section(runs=(fp32_run(), apart, by_hand), metrics=(), metrics_arm=None)
    assert converted_check(excused.parity).status == "unchecked"
    text = _section(small_report, excused, force_terminal=True, color_system="standard")
    assert len(re.findall(r"\x1b\[33mno *\x1b\[0m", text)) == 1
