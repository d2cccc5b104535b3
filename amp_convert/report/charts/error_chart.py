"""Geometry of the report's error chart: numbers in, SVG coordinates out.

x is the place of a node in the graph, y the base-10 logarithm of its relative error. Exact nodes
(error 0) have no logarithm and are left out; non-finite errors are marks on the upper edge. Several
nodes that share a pixel column are drawn as the worst of them, so the page stays small however
large the graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from amp_convert.report import text as fmt
from amp_convert.report.charts.svg import LEFT, RIGHT, TOP, Axis, Mark, decades, dots, line, log10
from amp_convert.report.model import RunReport
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.sections.summary import severity, tolerance
from amp_convert.validate.inference.results import NodeDivergence

HEIGHT, BOTTOM = 332, 284
_MAX_DECADES = 8
_MAX_BANDS = 40
_NAMED_SHARE = 0.6
_CHARACTER = 6.6
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Band:
    """A stretch of the graph that belongs to one part of the model; no label where none fits."""

    x: float
    width: float
    label: str


@dataclass(frozen=True)
class ErrorChart:
    """Everything to draw, in SVG user units.

    `accumulated` and `local` are path data; `caption` is what the names of all bands begin with.
    """

    decades: tuple[Mark, ...]
    bands: tuple[Band, ...]
    caption: str
    accumulated: str
    local: str
    worst: tuple[Mark, ...]
    failures: tuple[Mark, ...]
    tolerance: Mark | None


@dataclass(frozen=True)
class _Run:
    """Nodes `start` to `end` (exclusive) lie in one module, whose path is `part`."""

    start: int
    end: int
    part: tuple[str, ...]


def error_chart(report: RunReport) -> ErrorChart | None:
    """The chart of error along the graph; None when no node has an error to draw."""
    rows = [
        row
        for row in (report.inference.nodes if report.inference else ())
        if row.accumulated_rel_l2 is not None
    ]
    limit = tolerance(report)
    errors = [error for row in rows for error in (row.local_rel_l2, row.accumulated_rel_l2)]
    powers = decades([*errors, limit], _MAX_DECADES)
    if not rows or powers is None:
        return None
    x, y = Axis(-0.5, len(rows) - 0.5, LEFT, RIGHT), Axis(*powers, BOTTOM, TOP, log10)
    bands, caption = _bands([row.layer for row in rows])
    accumulated = _thinned([row.accumulated_rel_l2 for row in rows], x)
    local = _thinned([row.local_rel_l2 for row in rows], x)
    return ErrorChart(
        decades=tuple(
            Mark(LEFT, y.place(power), f"1e{power}") for power in range(powers[0], powers[1] + 1)
        ),
        bands=tuple(bands),
        caption=caption,
        accumulated=line([(place, y.at(error)) for place, error in accumulated]),
        local=dots((place, y.at(error)) for place, error in local),
        worst=tuple(_worst_marks(rows, x, y)),
        failures=tuple(_failures(rows, x)),
        tolerance=Mark(RIGHT, y.at(limit), f"tolerance {fmt.error(limit)}") if limit else None,
    )


def _drawable(error: float | None) -> bool:
    return error is not None and math.isfinite(error) and error > 0


def _thinned(errors: Sequence[float | None], x: Axis) -> list[tuple[float, float]]:
    columns: dict[int, tuple[float, float]] = {}
    for index, error in enumerate(errors):
        if error is not None and _drawable(error):
            place = x.at(index)
            held = columns.get(int(place))
            if held is None or error > held[1]:
                columns[int(place)] = (place, error)
    return list(columns.values())


def _label(row: NodeDivergence, error: float | None) -> str:
    return f"{layer_name(row.layer)} {fmt.printable(row.op)}: {fmt.error(error)}"


def _worst_marks(rows: Sequence[NodeDivergence], x: Axis, y: Axis) -> list[Mark]:
    ranked = sorted(
        (i for i, row in enumerate(rows) if _drawable(row.accumulated_rel_l2)),
        key=lambda i: -severity(rows[i].accumulated_rel_l2),
    )
    return [
        Mark(x.at(i), y.at(error), _label(rows[i], error))
        for i in ranked[:10]
        if (error := rows[i].accumulated_rel_l2) is not None
    ]


def _failures(rows: Sequence[NodeDivergence], x: Axis) -> list[Mark]:
    columns: dict[int, Mark] = {}
    for index, row in enumerate(rows):
        error = row.accumulated_rel_l2
        if error is not None and not math.isfinite(error):
            place = x.at(index)
            columns.setdefault(int(place), Mark(place, TOP, _label(row, error)))
    return list(columns.values())


def _bands(layers: Sequence[str]) -> tuple[list[Band], str]:
    """Parts of the model along x, and what their names begin with.

    They are the modules at the deepest level at which they are few enough and most of the width has
    room for their names.
    """
    paths = [tuple(layer.split(".")) if layer else () for layer in layers]
    chosen: tuple[list[Band], str] = ([], "")
    for depth in range(1, _MAX_DEPTH + 1):
        runs = _runs(paths, depth)
        shared = _shared(runs)
        bands = [_band(run, len(shared), len(layers)) for run in runs]
        named = sum(band.width for band in bands if band.label)
        if len(bands) > _MAX_BANDS or named < _NAMED_SHARE * (RIGHT - LEFT):
            break
        chosen = bands, fmt.printable(".".join(shared))
    return chosen


def _runs(paths: Sequence[tuple[str, ...]], depth: int) -> list[_Run]:
    """Stretches of nodes in one module; a node above all of them joins what precedes it."""
    runs: list[_Run] = []
    for index, path in enumerate(paths):
        part = path[:depth]
        if runs and part == runs[-1].part[: len(part)]:
            runs[-1] = replace(runs[-1], end=index + 1)
        else:
            runs.append(_Run(index, index + 1, part))
    return runs


def _shared(runs: Sequence[_Run]) -> tuple[str, ...]:
    """The path that all parts begin with, leaving each a name of its own."""
    if len(runs) < 2:
        return ()
    columns = zip(*(run.part[:-1] for run in runs), strict=False)
    return tuple(names[0] for names in itertools.takewhile(lambda c: len(set(c)) == 1, columns))


def _band(run: _Run, skip: int, nodes: int) -> Band:
    column = (RIGHT - LEFT) / nodes
    width = (run.end - run.start) * column
    label = fmt.printable(".".join(run.part[skip:]))
    fits = len(label) * _CHARACTER < width
    return Band(round(LEFT + run.start * column, 1), round(width, 1), label if fits else "")
