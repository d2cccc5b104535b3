"""Geometry of the histogram of gradient exponents."""

from __future__ import annotations

import re

import pytest

from amp_convert.report.charts.gradient_chart import BOTTOM, GradientChart, Ruler, gradient_chart
from amp_convert.report.charts.svg import LEFT, RIGHT, TOP
from tests.report.trained import gradients, range_of


def _chart(weights: dict[int, int], activations: dict[int, int], scale: float) -> GradientChart:
    found = gradient_chart(
        gradients(
            weight_range=range_of(weights), activation_range=range_of(activations), scale=scale
        )
    )
    assert found is not None
    return found


def _bars(path: str) -> list[tuple[float, float, float]]:
    """(left, top, right) of each bar."""
    pattern = r"M([\d.]+) [\d.]+V([\d.]+)H([\d.]+)V[\d.]+Z"
    return [(float(x), float(y), float(z)) for x, y, z in re.findall(pattern, path)]


def _zones(ruler: Ruler) -> list[tuple[str, float, float]]:
    return [(zone.kind, zone.x, round(zone.x + zone.width, 1)) for zone in ruler.zones]


def test_a_bar_a_power_of_two_as_high_as_its_share() -> None:
    chart = _chart({-3: 30, -12: 10}, {-10: 1}, 1.0)
    # The axis goes from 2 under the underflow border, 2**-26, to 3 over the overflow border, 2**19.
    unit = (RIGHT - LEFT) / 45
    assert [mark.label for mark in chart.shares] == ["0 %", "50 %", "100 %"]
    weights = _bars(chart.weights)
    assert [top for _, top, _ in weights] == [
        pytest.approx(BOTTOM - (BOTTOM - TOP) * share, abs=0.06) for share in (0.25, 0.75)
    ]
    (left, _, right), _ = weights
    assert LEFT + unit * (26 - 12) < left < right < LEFT + unit * (26 - 11)
    assert [top for _, top, _ in _bars(chart.activations)] == [TOP]


def test_a_share_that_is_not_0_is_seen() -> None:
    chart = _chart({-3: 1_000_000, -20: 1}, {}, 1.0)
    assert [top for _, top, _ in _bars(chart.weights)] == [BOTTOM - 1.5, TOP]
    assert chart.activations == ""


def test_the_borders_of_fp16_are_drawn_in() -> None:
    chart = _chart({-3: 1}, {-10: 1}, 1.0)
    unit = (RIGHT - LEFT) / 45
    (ruler,) = chart.rulers
    borders = [round(LEFT + unit * (26 + power), 1) for power in (-24, -14, 16)]
    assert ruler.borders == tuple(borders)
    assert ruler.title == "× 1"
    assert _zones(ruler) == [
        ("lost", LEFT, borders[0]),
        ("subnormal", borders[0], borders[1]),
        ("kept", borders[1], borders[2]),
        ("overflow", borders[2], RIGHT),
    ]


def test_a_loss_scale_moves_the_borders_by_its_exponent() -> None:
    chart = _chart({-3: 1}, {-10: 1}, 1024.0)
    assert [ruler.title for ruler in chart.rulers] == ["× 1", "× 2¹⁰"]
    plain, scaled = chart.rulers
    # From 2 under 2**-34 to 3 over 2**16.
    shift = 10 * (RIGHT - LEFT) / 55
    assert plain.borders == pytest.approx([x + shift for x in scaled.borders], abs=0.11)
    assert scaled.y > plain.y > BOTTOM


def test_gradients_of_a_double_are_counted_at_the_ends() -> None:
    chart = _chart({-1000: 1, -900: 1, 500: 6}, {}, 1.0)
    assert chart.shares[-1].label == "80 %"
    (left, low, _), (_, high, right) = _bars(chart.weights)
    assert (low, high) == tuple(round(BOTTOM - (BOTTOM - TOP) * s / 0.8, 1) for s in (0.25, 0.75))
    assert LEFT <= left < right <= RIGHT


def test_there_is_no_chart_when_every_gradient_is_zero() -> None:
    nothing = range_of({}, zeros=5)
    assert gradient_chart(gradients(weight_range=nothing, activation_range=nothing)) is None
