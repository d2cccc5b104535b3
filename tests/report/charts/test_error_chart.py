"""Geometry of the error chart."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from amp_convert.report import RunReport
from amp_convert.report.charts.error_chart import BOTTOM, error_chart
from amp_convert.report.charts.svg import LEFT, RIGHT, TOP
from amp_convert.validate.inference.results import NodeDivergence
from tests.report.builders import decision, divergence_of


def _report(report: RunReport, rows: list[NodeDivergence]) -> RunReport:
    assert report.inference is not None
    return report.model_copy(update={"inference": replace(report.inference, nodes=tuple(rows))})


def _rows(errors: list[float | None], layer: str = "a") -> list[NodeDivergence]:
    return [divergence_of(decision(layer, f"aten.op{i}"), None, e) for i, e in enumerate(errors)]


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_y_is_the_logarithm_of_the_error(small_report: RunReport) -> None:
    chart = error_chart(_report(small_report, _rows([1e-4, 1e-3, 1e-2])))
    assert chart is not None
    assert [mark.label for mark in chart.decades] == ["1e-4", "1e-3", "1e-2", "1e-1"]
    heights = [BOTTOM - (BOTTOM - TOP) * share for share in (0, 1 / 3, 2 / 3)]
    drawn = _points(chart.accumulated)
    assert all(abs(y - h) < 0.06 for (_, y), h in zip(drawn, heights, strict=True))
    width = (RIGHT - LEFT) / 3
    assert all(abs(x - (LEFT + width * (i + 0.5))) < 0.06 for i, (x, _) in enumerate(drawn))
    assert chart.tolerance is not None
    share = (math.log10(2e-2) + 4) / 3
    assert abs(chart.tolerance.y - (BOTTOM - (BOTTOM - TOP) * share)) < 0.06


def test_exact_nodes_have_no_point_and_non_finite_ones_a_mark(small_report: RunReport) -> None:
    rows = _rows([0.0, 1e-3, math.nan, math.inf, None, 1e-3])
    chart = error_chart(_report(small_report, rows))
    assert chart is not None
    assert len(_points(chart.accumulated)) == 2
    assert [mark.label for mark in chart.failures] == ["a aten.op2: nan", "a aten.op3: inf"]
    assert {mark.y for mark in chart.failures} == {TOP}


def test_there_is_no_chart_without_an_error(small_report: RunReport) -> None:
    assert error_chart(_report(small_report, [])) is None
    assert error_chart(_report(small_report, _rows([None, None]))) is None
    assert error_chart(small_report.model_copy(update={"inference": None})) is None


def test_tiny_errors_are_held_at_the_lower_edge(small_report: RunReport) -> None:
    chart = error_chart(_report(small_report, _rows([1e-30, 1e-3])))
    assert chart is not None
    assert len(chart.decades) == 9
    assert _points(chart.accumulated)[0][1] == BOTTOM


@pytest.mark.slow
def test_a_pixel_column_shows_its_worst_node(small_report: RunReport) -> None:
    errors: list[float | None] = [1e-4] * 20_000
    errors[777] = 1e-2
    chart = error_chart(_report(small_report, _rows(errors)))
    assert chart is not None
    drawn = _points(chart.accumulated)
    assert len(drawn) <= RIGHT - LEFT + 1
    assert len(chart.accumulated) < 20_000
    highest = min(drawn, key=lambda point: point[1])
    assert abs(highest[0] - (LEFT + (RIGHT - LEFT) * 777.5 / 20_000)) < 1


def test_bands_follow_the_modules(small_report: RunReport) -> None:
    rows = [
        row
        for layer in ("net.block.0", "net.block.0.fc", "", "net.block.1", "net.head")
        for row in _rows([1e-3] * 10, layer)
    ]
    chart = error_chart(_report(small_report, rows))
    assert chart is not None
    assert chart.caption == "net"
    assert [band.label for band in chart.bands] == ["block.0", "block.0.fc", "block.1", "head"]
    assert chart.bands[0].x == LEFT
    assert [band.width for band in chart.bands] == [
        round((RIGHT - LEFT) * share, 1) for share in (0.2, 0.4, 0.2, 0.2)
    ]


def test_too_many_modules_give_wider_bands_or_none(small_report: RunReport) -> None:
    blocks = [row for i in range(90) for row in _rows([1e-3], f"net.block.{i}")]
    chart = error_chart(_report(small_report, blocks))
    assert chart is not None
    assert [band.label for band in chart.bands] == ["net.block"]
    deep = [
        row
        for i in range(3)
        for name in "abcdefgh"
        for row in _rows([1e-3] * 10, f"net.block.{i}.a_rather_long_name_{name}")
    ]
    chart = error_chart(_report(small_report, deep))
    assert chart is not None
    assert (chart.caption, [band.label for band in chart.bands]) == ("net.block", ["0", "1", "2"])
    flat = [row for i in range(90) for row in _rows([1e-3], f"layer{i}")]
    chart = error_chart(_report(small_report, flat))
    assert chart is not None
    assert chart.bands == ()


def test_the_worst_nodes_are_marked(small_report: RunReport) -> None:
    chart = error_chart(_report(small_report, _rows([10.0**-i for i in range(1, 13)])))
    assert chart is not None
    assert len(chart.worst) == 10
    assert chart.worst[0].label == "a aten.op0: 1.00e-01"
    assert TOP <= chart.worst[0].y <= BOTTOM
