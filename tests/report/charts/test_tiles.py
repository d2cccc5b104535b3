"""The headline figures of the page."""

from __future__ import annotations

from amp_convert.report import RunReport
from amp_convert.report.charts.tiles import Tile, tiles, training_tiles
from tests.report.trained import arm_of, gradients, over_seeds, parity, run_of


def test_the_figures_against_fp32(small_report: RunReport) -> None:
    low = ("of the multiply-adds", "2 of 5 nodes", "3 casts inserted")
    assert tiles(small_report) == [
        Tile("output error", "5.00e-04", ("native autocast 6.00e-04", "limit 2.00e-02")),
        Tile("accuracy", "0.96", ("FP32 0.975", "change -0.015")),
        Tile("time", "1.25 ms", ("FP32 2 ms", "1.60 × as fast")),
        Tile("peak memory", "2 MiB", ("FP32 3 MiB", "0.67 × the memory")),
        Tile("in low precision", "100 %", low),
    ]


def test_the_figures_of_training(trained_report: RunReport) -> None:
    assert training_tiles(parity(), trained_report.verdict.checks) == [
        Tile("loss, last quarter", "0.376", ("FP32 0.375", "change +0.001")),
        Tile("accuracy", "0.74", ("FP32 0.75", "change -0.01")),
        Tile("gradient error", "4.00e-03", ("cosine 0.999", "limit 1.00e-01")),
        Tile("FP16 underflow", "0 %", ("of activation gradients", "10.0 % unscaled")),
        Tile("time per step", "1 ms", ("FP32 2 ms", "2.00 × as fast")),
    ]


def test_a_test_over_seeds_comes_first() -> None:
    found = parity(**over_seeds([0.9] * 5, [0.91] * 5))
    assert training_tiles(found, ())[0] == Tile(
        "difference over seeds", "+0.01", ("pass", "5 pairs", "margin 0.05")
    )
    early = parity(**over_seeds([0.9], [0.9]))
    assert training_tiles(early, ())[0] == Tile(
        "difference over seeds", "not yet", ("inconclusive", "1 pair", "margin 0.05")
    )


def test_training_that_made_no_step_has_gradients_alone() -> None:
    run = run_of(arm_of("fp32", []), arm_of("mixed", []))
    found = parity(run=run, gradients=gradients(scale=1.0))
    assert [tile.title for tile in training_tiles(found, ())] == ["gradient error"]
