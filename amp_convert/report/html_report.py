"""report.html: one page with everything in it, which loads nothing and runs nothing.

The template autoescapes; the content security policy allows only the page's own style sheet, by its
hash, so that a name which slipped through could neither run nor load anything. There is no script:
folding is `<details>`, charts are inline SVG.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from amp_convert.plan import Decision
from amp_convert.report import charts
from amp_convert.report import format as fmt
from amp_convert.report.grouping import (
    fp32_groups,
    layer_name,
    layers_text,
    ops_text,
    stays_fp32,
)
from amp_convert.report.model import RunReport
from amp_convert.report.summary import (
    ARMS,
    comparison,
    gaps,
    tolerance,
    verdict_sentence,
    worst_layers,
    worst_output,
)

TEMPLATES = Path(__file__).with_name("templates")
_MAX_ROWS = 1_500
_NAME = 100
_PLACE = 40
_PROSE = 600


@dataclass(frozen=True)
class Tile:
    """A headline figure: what it is, its value, and what to compare it with."""

    title: str
    value: str
    notes: tuple[str, ...]


def html_text(report: RunReport) -> str:
    """The text of report.html."""
    environment = _environment()
    style = environment.get_template("report.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(_content(report), style_hash=digest)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "prose": lambda text: fmt.clip(fmt.printable(text), _PROSE),
        "name": lambda text: fmt.clip(fmt.printable(text), _NAME),
        "layer": lambda text: fmt.tail(layer_name(text), _NAME),
        "place": lambda text: fmt.tail(fmt.printable(text), _PLACE),
        "error": fmt.error,
        "number": fmt.number,
        "quantity": fmt.quantity,
        "percent": fmt.percent,
        "count": fmt.count,
        "millions": fmt.millions,
        "bar": _bar,
    }
    return environment


def _content(report: RunReport) -> dict[str, object]:
    decisions = report.plan.decisions
    rows = comparison(report)
    return {
        "report": report,
        "sentence": verdict_sentence(report),
        "tiles": _tiles(report),
        "rows": rows,
        "arms": [arm for arm in ARMS if any(getattr(row, arm) for row in rows)],
        "chart": charts.error_chart(report),
        "frame": charts,
        "worst": worst_layers(report),
        "groups": fp32_groups(decisions),
        "layers_text": layers_text,
        "ops_text": ops_text,
        "stays_fp32": stays_fp32,
        "gaps": gaps(report),
        "nodes": decisions[:_MAX_ROWS],
        "nodes_left": len(decisions) - len(decisions[:_MAX_ROWS]),
        "errors": {row.node: row for row in report.inference.nodes} if report.inference else {},
        "fp32_nodes": sum(map(stays_fp32, decisions)),
        "shares": _shares(report, decisions),
    }


def _bar(error: float | None) -> float:
    """Length of an error's bar, 0 to 100: a logarithmic scale from 1e-7 to 1."""
    if error is None or error <= 0:
        return 0.0
    if not math.isfinite(error):
        return 100.0
    return round(min(max((math.log10(error) + 7) / 7 * 100, 1.0), 100.0), 1)


def _shares(report: RunReport, decisions: tuple[Decision, ...]) -> list[tuple[str, float, str]]:
    macs = sum(decision.macs for decision in decisions)
    plan = report.plan
    return [
        ("multiply-adds", plan.share_macs_low, f"{fmt.millions(macs)} in all"),
        ("nodes", plan.share_nodes_low, f"{plan.nodes:,} in all"),
    ]


def _tiles(report: RunReport) -> list[Tile]:
    plan = report.plan
    tiles = [*_error_tile(report), *_metric_tiles(report), *_cost_tiles(report)]
    nodes = f"{plan.low_nodes:,} of {fmt.count(plan.nodes, 'node')}"
    notes = ("of the multiply-adds", nodes, f"{fmt.count(plan.casts, 'cast')} inserted")
    return [*tiles, Tile("in low precision", fmt.percent(plan.share_macs_low), notes)]


def _error_tile(report: RunReport) -> list[Tile]:
    inference = report.inference
    mixed = worst_output(inference.outputs) if inference else None
    if inference is None or mixed is None:
        return []
    autocast = worst_output(inference.autocast_outputs)
    limit = tolerance(report)
    notes = [f"native autocast {fmt.error(autocast.rel_l2)}"] if autocast else []
    notes += [f"limit {fmt.error(limit)}"] if limit is not None else []
    return [Tile("output error", fmt.error(mixed.rel_l2), tuple(notes))]


def _metric_tiles(report: RunReport) -> list[Tile]:
    return [
        Tile(
            fmt.clip(fmt.printable(metric.name), 40),
            fmt.number(metric.mixed),
            (f"FP32 {fmt.number(metric.fp32)}", f"change {fmt.change(metric.fp32, metric.mixed)}"),
        )
        for metric in (report.inference.metrics if report.inference else ())[:2]
    ]


def _cost_tiles(report: RunReport) -> list[Tile]:
    costs = {cost.arm: cost for cost in report.inference.costs} if report.inference else {}
    fp32, mixed = costs.get("fp32"), costs.get("mixed")
    if fp32 is None or mixed is None:
        return []
    tiles = []
    if fp32.milliseconds and mixed.milliseconds:
        ratio = f"{fp32.milliseconds / mixed.milliseconds:.2f} × as fast"
        notes = (f"FP32 {fmt.milliseconds(fp32.milliseconds)}", ratio)
        tiles.append(Tile("time", fmt.milliseconds(mixed.milliseconds), notes))
    if fp32.peak_bytes and mixed.peak_bytes:
        ratio = f"{mixed.peak_bytes / fp32.peak_bytes:.2f} × the memory"
        notes = (f"FP32 {fmt.mebibytes(fp32.peak_bytes)}", ratio)
        tiles.append(Tile("peak memory", fmt.mebibytes(mixed.peak_bytes), notes))
    return tiles
