"""What tuning found, on the terminal: plans beside one another, and what the chosen one keeps."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from amp_convert.report import text as fmt
from amp_convert.report.writers.terminal import error_text, heading, indented, short_layer
from amp_convert.report.writers.tune_files import goals_text, price
from amp_convert.tune.results import Cost, Point, Tuned

_MOST = 12
_COSTS = {
    Cost.MEASURED: "prices measured on this device",
    Cost.MODEL: "prices by multiply-adds, since this device has no fast kernels for the dtype",
}


def render_tuned(console: Console, tuned: Tuned, folder: Path) -> None:
    """Print the result; `folder` is where its files are."""
    word, colour = ("REACHED", "green") if tuned.reached else ("NOT REACHED", "red")
    console.print(
        Text.assemble((f" {word} ", f"bold reverse {colour}"), f"  {goals_text(tuned.goals)}")
    )
    note = f"{fmt.count(tuned.trials, 'plan')} tried; {_COSTS[tuned.cost]}"
    console.print(Text(note, style="dim"))
    console.print()
    console.print(indented(_plans(tuned)))
    console.print()
    console.print(_kept(tuned))
    console.print()
    console.print(
        heading("Frontier", f"{fmt.count(len(tuned.frontier), 'plan')} that no other beats")
    )
    console.print(Text(f"Rules: {folder}/tuned.toml, for --rules"), soft_wrap=True)


def _plans(tuned: Tuned) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    metrics = [name for name, _ in tuned.fp32_metrics][:3]
    for name in ("error", "speed", "low", "in FP32", *metrics):
        table.add_column(fmt.printable(name), justify="right", no_wrap=True)
    for name, point in (
        ("all low", tuned.lowest),
        ("the rules given", tuned.given),
        ("chosen" if tuned.reached else "nearest", tuned.chosen),
    ):
        table.add_row(name, *_cells(point, metrics))
    if metrics:
        fp32 = dict(tuned.fp32_metrics)
        table.add_row("FP32", "", "1.00 x", "", "", *(fmt.number(fp32[name]) for name in metrics))
    return table


def _cells(point: Point, metrics: list[str]) -> list[Text | str]:
    values = dict(point.metrics)
    return [
        error_text(point.error),
        f"{point.speedup:.2f} x",
        fmt.percent(point.share_macs_low),
        f"{len(point.units):,}" if point.predicted or point.units else "",
        *(fmt.number(values[name]) if name in values else "" for name in metrics),
    ]


def _kept(tuned: Tuned) -> Group:
    names = tuned.chosen.units
    units = sorted((tuned.unit(name) for name in names), key=lambda unit: -unit.error)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("adds", justify="right", no_wrap=True)
    table.add_column("FP32 costs", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold")
    for unit in units[:_MOST]:
        table.add_row(error_text(unit.error), price(unit, tuned.cost), short_layer(unit.name))
    left = len(units) - len(units[:_MOST])
    more = [Text(f"and {left} more, in tuned.toml", style="dim")] if left else []
    title = heading("Kept in FP32", f"{len(units)} of {fmt.count(len(tuned.units), 'layer')}")
    return Group(title, indented(table, *more)) if units else Group(title)
