"""The training section of report.md."""

from __future__ import annotations

import html
from collections.abc import Callable

from amp_convert.report import Unchecked
from amp_convert.report.text import printable
from amp_convert.report.writers.training_markdown import training_lines
from tests.report.builders import HOSTILE
from tests.report.trained import gradients, hostile_parity, over_seeds, parity


def _text(*args: object, **changes: object) -> str:
    return "\n".join(training_lines(parity(**changes))) + "\n"


def test_golden(golden: Callable[[str, str], None]) -> None:
    mixed = [0.9, 0.91, 0.88, 0.9, 0.92]
    golden("training.md", _text(**over_seeds([0.9] * 5, mixed)))


def test_bfloat16_has_no_columns_for_a_scale() -> None:
    text = _text(gradients=gradients(dtype="bfloat16", scale=1.0))
    assert "| FP32 gradients of | not zero | largest | under 2⁻²⁴ | under 2⁻¹⁴ |\n" in text
    assert "| activations | 100 of 120 | 1.46e-03 | 10.0 % | 50.0 % |\n" in text
    assert "Recommended static loss scale: none, since bfloat16 has FP32's range." in text


def test_training_that_did_not_run_says_why() -> None:
    lines = training_lines(Unchecked(reason="the model file has no loss"))
    assert lines == ["## Training", "", "Not checked: the model file has no loss."]


def test_why_training_ended_stands_first() -> None:
    lines = training_lines(parity(ended="interrupted after 8 of 50 steps"))
    assert "**interrupted after 8 of 50 steps.**" in lines[:5]


def test_hostile_text_stays_text() -> None:
    lines = training_lines(hostile_parity())
    text = "\n".join(lines)
    for name in HOSTILE:
        assert printable(name) in html.unescape(text)
    assert "<script>" not in text.replace(
        "`<script>alert(1)</script>.<script>alert(1)</script>`", ""
    )
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for rows in tables:
        assert {row.count("|") for row in rows} == {rows[0].count("|")}
