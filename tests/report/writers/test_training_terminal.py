"""The training section on the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console

from amp_convert.report import RunReport
from amp_convert.report.writers.terminal import render
from amp_convert.validate.training.results import TrainingParity
from tests.report.trained import arm_of, gradients, long_parity, over_seeds, parity, run_of


def _section(report: RunReport, training: TrainingParity) -> str:
    stream = io.StringIO()
    changed = report.model_copy(update={"training": training})
    render(Console(file=stream, width=80), changed, None)
    text = re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)
    return text[text.index("Training  ") : text.index("Stays FP32")]


def test_golden(small_report: RunReport, golden: Callable[[str, str], None]) -> None:
    mixed = [0.9, 0.91, 0.88, 0.9, 0.92]
    golden("training.txt", _section(small_report, parity(**over_seeds([0.9] * 5, mixed))))


def test_the_widest_figures_fit(small_report: RunReport) -> None:
    loss = -1.23456e-05
    arms = [
        arm_of(
            name, [loss], scales=(2.0**126, 16384.0), skipped=(1,), drift=1e-12,
            metrics={"a_metric_with_a_rather_long_name": -1.23456e-05}, milliseconds=123456.0,
            peak_bytes=2**36,
        )
        for name in ("fp32", "mixed", "autocast", "noise")
    ]  # fmt: skip
    text = _section(small_report, parity(run=run_of(*arms)))
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert text.count("-1.23456e-05") == 12
    assert "2¹²⁶→16384" in text


def test_an_early_end_stands_first(small_report: RunReport) -> None:
    found = parity(ended="interrupted after 8 of 50 steps")
    lines = _section(small_report, found).splitlines()
    assert lines[:2] == [
        "Training  8 steps of SGD, learning rate 0.1",
        "  interrupted after 8 of 50 steps",
    ]


def test_no_step_leaves_the_gradients(small_report: RunReport) -> None:
    run = run_of(arm_of("fp32", []), arm_of("mixed", []))
    text = _section(small_report, parity(run=run, ended="interrupted"))
    assert "fp32" not in text
    assert "relative L2 error 4.00e-03" in text


def test_bfloat16_needs_no_scale(small_report: RunReport) -> None:
    found = parity(gradients=gradients(dtype="bfloat16", scale=1.0))
    text = _section(small_report, found)
    assert "static scale    none, since bfloat16 has FP32's range" in text
    assert "without a loss scale" in text


def test_however_long_the_training_the_section_is_short(small_report: RunReport) -> None:
    assert len(_section(small_report, long_parity(3_000)).splitlines()) < 32
