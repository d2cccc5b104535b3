"""What tuning found, as files: tuned.toml for `--rules`, frontier.csv, frontier.svg, tune.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from amp_convert import __version__
from amp_convert.plan.saved_plan import quoted
from amp_convert.report import text as fmt
from amp_convert.report.charts.frontier_chart import frontier_svg
from amp_convert.report.folder import write_folder
from amp_convert.report.model import Section
from amp_convert.report.writers.csv_report import csv_text
from amp_convert.report.writers.json_report import json_text
from amp_convert.rules.load import preset_names
from amp_convert.rules.rule import LOSS_LIMITS
from amp_convert.tune.results import Cost, Goals, Point, Tuned, Unit

RULES, FRONTIER, PICTURE, RESULT = "tuned.toml", "frontier.csv", "frontier.svg", "tune.json"


class TuneReport(Section):
    """The whole result, as tune.json holds it and `amp-convert tune --json` prints it."""

    schema_version: Literal[1] = 1
    amp_convert: str = __version__
    tuned: Tuned


def tune_json(tuned: Tuned) -> str:
    """The result as strict JSON; numbers that JSON lacks are text."""
    return json_text(TuneReport(tuned=tuned))


def rules_toml(tuned: Tuned, rules: Sequence[str], folder: Path) -> str:
    """The chosen plan as a rules file for `--rules`; `rules` are those it was tuned from, `folder`
    where the file will lie, from which it finds them."""
    chosen = tuned.chosen
    lines = [
        "# Written by amp-convert tune. Give it back with --rules.",
        f"# Error {fmt.error(chosen.error)} against FP32, {chosen.speedup:.2f} times its speed.",
        f"extends = [{', '.join(quoted(_from(folder, name)) for name in rules)}]",
        "",
        "# The error that they guard against was measured, and is what the rules below are for.",
        "[guards]",
        *(f"{name} = false" for name in LOSS_LIMITS),
    ]
    total = sum(unit.error**2 for unit in tuned.units) or 1.0
    for name in chosen.units:
        unit = tuned.unit(name)
        for node in unit.nodes:
            lines += [
                "",
                "[[rule]]",
                f"node = {quoted(node)}",
                'category = "deny"',
                f"reason = {quoted(_reason(unit, total, tuned.cost))}",
            ]
    return "\n".join(lines) + "\n"


def _from(folder: Path, name: str) -> str:
    if name in preset_names():
        return name
    return os.path.relpath(os.path.realpath(name), os.path.realpath(folder))


def _reason(unit: Unit, total: float, cost: Cost) -> str:
    share = fmt.percent(unit.error**2 / total)
    return f"its layer adds {share} of the squared error while low; FP32 costs {price(unit, cost)}"


def price(unit: Unit, cost: Cost) -> str:
    """What FP32 costs more in a unit, in words."""
    if cost is Cost.MEASURED:
        return f"{fmt.milliseconds(unit.price)} a call"
    return f"{fmt.percent(unit.price)} of the multiply-adds"


def frontier_csv(points: Iterable[Point]) -> str:
    """A row a plan, from the smallest error."""
    rows = list(points)
    names = list(dict.fromkeys(name for point in rows for name, _ in point.metrics))
    figures = ["error", "predicted", "price", "speedup", "share_macs_low", "units_in_fp32"]
    return csv_text(
        [*figures, *names, "units"],
        (
            [
                point.error,
                point.predicted,
                point.price,
                point.speedup,
                point.share_macs_low,
                len(point.units),
                *(dict(point.metrics).get(name) for name in names),
                " ".join(point.units),
            ]
            for point in rows
        ),
    )


def goals_text(goals: Goals) -> str:
    """The goals in words."""
    said = []
    if goals.tolerance is not None:
        said.append(f"an error of at most {goals.tolerance:g}")
    if goals.max_drop is not None:
        said.append(f"{goals.metric} at most {goals.max_drop:g} worse than FP32's")
    if goals.speed is not None:
        said.append(f"{goals.speed:g} times FP32's speed")
    return ", ".join(said)


def write_tuned(out: Path, tuned: Tuned, rules: Sequence[str]) -> None:
    """Write the files. Raises UsageError as `write_folder`."""
    files = {
        RULES: rules_toml(tuned, rules, out),
        FRONTIER: frontier_csv(tuned.frontier),
        PICTURE: frontier_svg(tuned),
        RESULT: tune_json(tuned),
    }
    write_folder(out, files)
