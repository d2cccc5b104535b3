"""Geometry of the charts over the steps of training."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amp_convert.report.charts.svg import LEFT, RIGHT, TOP, Mark
from amp_convert.report.charts.training_charts import (
    StepChart,
    distance_chart,
    loss_chart,
    scale_chart,
)
from amp_convert.validate.training.results import PairedRun
from tests.report.trained import arm_of, four_arms, run_of

Point = tuple[float, float]


def _points(path: str) -> list[Point]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def _curves(chart: StepChart | None) -> dict[str, str]:
    assert chart is not None
    return {curve.arm: curve.path for curve in chart.curves}


def _run(fp32: list[float], mixed: list[float] | None = None, **changes: object) -> PairedRun:
    arms = [arm_of("fp32", fp32)]
    return run_of(*arms, *([arm_of("mixed", mixed, **changes)] if mixed is not None else []))


def test_losses_stand_at_their_steps_on_a_linear_axis() -> None:
    chart = loss_chart(_run([2.0, 1.0, 0.5], [2.0, 1.5, 0.0]))
    assert chart is not None
    assert (LEFT, RIGHT, TOP, chart.bottom) == (58, 946, 24, 254)
    # From 0 to 2 over 230 units, and from step 1 to 3 over 888.
    assert [(mark.y, mark.label) for mark in chart.ticks] == [
        (254, "0"), (196.5, "0.5"), (139, "1"), (81.5, "1.5"), (24, "2"),
    ]  # fmt: skip
    assert [(mark.x, mark.label) for mark in chart.steps] == [(58, "1"), (502, "2"), (946, "3")]
    assert _curves(chart) == {
        "fp32": "M58 24L502 139L946 196.5",
        "mixed": "M58 24L502 81.5L946 254",
    }


def test_the_noise_arm_is_a_band_that_only_grows() -> None:
    noise = arm_of("noise", [2.0, 1.25, 0.5])
    run = run_of(arm_of("fp32", [2.0, 1.0, 0.5]), arm_of("mixed", [2.0, 1.0, 0.5]), noise)
    chart = loss_chart(run)
    assert chart is not None
    # The difference so far: 0, 0.25, 0.25.
    assert list(_curves(chart)) == ["fp32", "mixed"]
    assert _points(chart.noise) == [
        (58, 24), (502, 110.2), (946, 167.8), (946, 225.2), (502, 167.8), (58, 24),
    ]  # fmt: skip
    assert chart.noise.endswith("Z")
    exact = replace(run, arms=(*run.arms[:2], replace(noise, losses=(2.0, 1.0, 0.5))))
    chart = loss_chart(exact)
    assert chart is not None
    assert chart.noise == ""


def test_the_band_ends_where_the_noise_arm_does() -> None:
    losses = [2.0, 1.0, 0.5, 0.25]
    noise = arm_of("noise", [2.5, 1.0, math.nan, 0.25])
    chart = loss_chart(run_of(arm_of("fp32", losses), noise))
    assert chart is not None
    assert {x for x, _ in _points(chart.noise)} == {58, 354}


def test_losses_over_two_decades_have_a_logarithmic_axis() -> None:
    chart = loss_chart(_run([100.0, 10.0, 1.0], [100.0, 10.0, -1.0]))
    assert chart is not None
    assert [mark.label for mark in chart.ticks] == ["1e-2", "1e-1", "1e0", "1e1", "1e2"]
    # A loss of -1 has no logarithm: it lies at the lower edge.
    assert _points(_curves(chart)["mixed"])[-1] == (RIGHT, chart.bottom)


def test_a_loss_far_off_does_not_squeeze_fp32s_curve() -> None:
    chart = loss_chart(_run([2.0, 1.5, 1.0], [2.0, 1e9, -1e9]))
    assert chart is not None
    # FP32 spans 1 to 2, and gets as much room again on either side: 0 to 3.
    assert [mark.label for mark in chart.ticks] == ["0", "1", "2", "3"]
    assert [y for _, y in _points(_curves(chart)["mixed"])][1:] == [TOP, chart.bottom]


def test_what_is_not_finite_breaks_the_line_and_is_marked() -> None:
    chart = loss_chart(_run([2.0, 1.5, 1.0, 0.5], [2.0, math.nan, 1.0, math.inf]))
    assert chart is not None
    assert re.findall("[MLh]", _curves(chart)["mixed"]) == ["M", "h", "M", "h"]
    assert chart.failures == (
        Mark(354, TOP, "mixed: loss nan at step 2"),
        Mark(946, TOP, "mixed: loss inf at step 4"),
    )


def test_an_arm_that_stops_early_has_an_end() -> None:
    note = "its loss scale is under 1 after step 2"
    chart = loss_chart(_run([2.0, 1.0, 0.0], [2.0, 1.0], note=note))
    assert chart is not None
    label = f"mixed stopped after step 2 of 3: {note}"
    assert chart.ends == (Mark(502, 139, label),)
    assert _points(_curves(chart)["mixed"])[-1] == (502, 139)
    # Its last loss has no place in the chart: the mark above says why it ended.
    chart = loss_chart(_run([2.0, 1.0, 0.0], [2.0, math.nan], note="its loss is nan"))
    assert chart is not None
    assert chart.ends == ()
    assert len(chart.failures) == 1


def test_one_step_or_equal_losses_can_be_drawn() -> None:
    assert _curves(loss_chart(_run([1.0])))["fp32"].endswith("h0")
    chart = loss_chart(_run([0.5] * 4))
    assert {y for _, y in _points(_curves(chart)["fp32"])} == {139}


@pytest.mark.parametrize(
    "run",
    [run_of(), _run([]), _run([math.nan, math.inf], [math.nan, math.nan])],
    ids=["no arm", "no step", "nothing finite"],
)
def test_there_is_no_chart_without_a_loss(run: PairedRun) -> None:
    assert loss_chart(run) is None
    assert distance_chart(run) is None
    assert scale_chart(run) is None


def test_distances_are_on_a_logarithmic_axis_over_the_noise() -> None:
    run = run_of(
        arm_of("fp32", [0.0, 0.0, 0.0]),
        arm_of("mixed", [0.0, 0.01, -0.1]),
        arm_of("noise", [0.0, 0.001, 0.0]),
    )
    chart = distance_chart(run)
    assert chart is not None
    assert [mark.label for mark in chart.ticks] == ["1e-1", "1e-2", "1e-3"]
    heights = {mark.label: mark.y for mark in chart.ticks}
    # At the first step there is no difference, and so no point.
    assert _curves(chart) == {
        "mixed": f"M502 {heights['1e-2']:g}L946 {heights['1e-1']:g}",
    }
    assert _points(chart.noise) == [
        (58, chart.bottom), (58, chart.bottom), (502, heights["1e-3"]), (946, heights["1e-3"]),
        (946, chart.bottom),
    ]  # fmt: skip


def test_arms_that_agree_in_every_bit_have_no_distance() -> None:
    assert distance_chart(_run([1.0, 0.5], [1.0, 0.5])) is None


def test_the_scale_is_a_staircase_with_the_skipped_steps_below() -> None:
    scales = (2.0**16, 2.0**15, 2.0**15, 2.0**16)
    run = _run([1.0] * 4, [1.0] * 4, scales=scales, skipped=(1, 3))
    chart = scale_chart(run)
    assert chart is not None
    labels = {mark.label: mark.y for mark in chart.ticks}
    assert list(labels) == ["2¹⁴", "2¹⁵", "2¹⁶", "2¹⁷"]
    high, low = labels["2¹⁶"], labels["2¹⁵"]
    assert _curves(chart) == {"mixed": f"M58 {high:g}H354V{low:g}H946V{high:g}H946"}
    assert [(stroke.arm, stroke.path, stroke.label) for stroke in chart.skipped] == [
        ("mixed", f"M58 {chart.bottom - 3:g}v-9M650 {chart.bottom - 3:g}v-9",
         "mixed: 2 steps skipped: 1, 3"),
    ]  # fmt: skip
    assert labels["2¹⁴"] < chart.bottom - 3 - 9
    assert chart.limit is None


def test_the_scale_chart_has_a_line_at_1_where_it_matters() -> None:
    chart = scale_chart(_run([1.0] * 3, [1.0] * 3, scales=(4.0, 1.0, 0.5)))
    assert chart is not None
    assert chart.limit is not None
    assert chart.limit.y == {mark.label: mark.y for mark in chart.ticks}["2⁰"]


def test_there_is_no_scale_chart_without_a_scale() -> None:
    assert scale_chart(_run([1.0] * 3, [1.0] * 3)) is None
    assert list(_curves(scale_chart(four_arms()))) == ["mixed", "autocast"]


def test_a_scale_that_overflows_leaves_a_gap() -> None:
    chart = scale_chart(_run([1.0] * 3, [1.0] * 3, scales=(1024.0, math.inf, 1024.0)))
    assert _curves(chart)["mixed"].count("M") == 2


def test_many_steps_stay_small_and_an_accident_is_still_seen() -> None:
    steps, accident = 20_000, 7_777
    fp32 = [step % 2 + (10.0 if step < steps / 2 else 0.0) for step in range(steps)]
    mixed = [*fp32[:accident], 1e6, *fp32[accident + 1 :]]
    scales = tuple(2.0 ** (8 + step % 9) for step in range(steps))
    run = _run(fp32, mixed, scales=scales, skipped=tuple(range(1, steps, 3)))
    losses, distances, scale = loss_chart(run), distance_chart(run), scale_chart(run)
    assert losses is not None
    assert distances is not None
    assert scale is not None
    # 45 steps a column, half of them 1 more: their mean is 10.5 and then 0.5, within 1/90.
    drawn = _points(_curves(losses)["fp32"])
    low, high = losses.ticks[0], losses.ticks[-1]
    unit = (low.y - high.y) / (float(high.label) - float(low.label))
    means = [float(low.label) + (low.y - y) / unit for _, y in drawn]
    assert len(means) == 445
    assert means[:222] == pytest.approx([10.5] * 222, abs=0.02)
    assert means[223:444] == pytest.approx([0.5] * 221, abs=0.02)
    place = LEFT + (RIGHT - LEFT) * accident / (steps - 1)
    for chart in (losses, distances):
        top = min(_points(_curves(chart)["mixed"]), key=lambda point: point[1])
        assert abs(top[0] - place) <= 2
    levels = {mark.label: mark.y for mark in scale.ticks}
    corners = {float(y) for y in re.findall(r"V([\d.]+)", _curves(scale)["mixed"])}
    assert min(corners) < levels["2¹⁵"] < levels["2¹⁰"] < max(corners)
    assert max(len(str(chart)) for chart in (losses, distances, scale)) < 40_000


_ANY = st.lists(st.floats(), max_size=12)


@settings(deadline=None)
@given(_ANY, _ANY, _ANY, st.lists(st.floats(), max_size=12))
@example([0.0, 1.0000000000000002e300], [], [0.0, 7.4e283], [])  # just too large to be drawn
def test_any_losses_and_scales_lie_within_the_frame(
    fp32: list[float], mixed: list[float], noise: list[float], scales: list[float]
) -> None:
    run = run_of(
        arm_of("fp32", fp32),
        arm_of("mixed", mixed, scales=tuple(scales), skipped=(1,), note="stopped"),
        arm_of("noise", noise),
    )
    for chart in (loss_chart(run), distance_chart(run), scale_chart(run)):
        if chart is None:
            continue
        paths = [*(curve.path for curve in chart.curves), chart.noise]
        assert "nan" not in "".join(paths)
        assert "inf" not in "".join(paths)
        for x, y in [*_points("".join(paths)), *((m.x, m.y) for m in (*chart.ends,))]:
            assert LEFT <= x <= RIGHT
            assert TOP <= y <= chart.bottom
