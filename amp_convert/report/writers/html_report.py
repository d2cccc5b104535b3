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
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from amp_convert.report import text as fmt
from amp_convert.report.charts import error_chart, gradient_chart, svg, training_charts
from amp_convert.report.charts.tiles import tiles, training_tiles
from amp_convert.report.model import RunReport, Unchecked
from amp_convert.report.records import NodeRecord
from amp_convert.report.sections import (
    gradient_summary,
    layer_times,
    onnx_node_summary,
    onnx_summary,
    training_summary,
)
from amp_convert.report.sections.archive import archive_text
from amp_convert.report.sections.attribution import LEAD as ATTRIBUTED
from amp_convert.report.sections.attribution import attribution_summary
from amp_convert.report.sections.compiled_summary import compiled_summary
from amp_convert.report.sections.eager_plan import eager_plan_text
from amp_convert.report.sections.gaps import gaps
from amp_convert.report.sections.grouping import (
    fp32_groups,
    layer_name,
    layers_text,
    ops_text,
    stays_fp32,
)
from amp_convert.report.sections.islands import LEAD, TWICE, island_rows, twice_text
from amp_convert.report.sections.layer_times import time_rows
from amp_convert.report.sections.summary import ARMS, comparison, verdict_sentence, worst_layers

TEMPLATES = Path(__file__).parents[1] / "templates"
_MAX_ROWS = 1_500
_NAME = 100
_PLACE = 40
_PROSE = 600


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
        "capitalised": lambda text: text[:1].upper() + text[1:],
        "number": fmt.number,
        "quantity": fmt.quantity,
        "percent": fmt.percent,
        "count": fmt.count,
        "millions": fmt.millions,
        "size": fmt.size,
        "bar": _bar,
    }
    return environment


def _content(report: RunReport) -> dict[str, object]:
    decisions = report.plan.decisions
    rows = comparison(report)
    return {
        "report": report,
        "sentence": verdict_sentence(report),
        "tiles": tiles(report),
        "rows": rows,
        "archive": archive_text(report),
        "eager_plan": eager_plan_text(report),
        "arms": [arm for arm in ARMS if any(getattr(row, arm) for row in rows)],
        "chart": error_chart.error_chart(report),
        "frame": error_chart,
        "svg": svg,
        "worst": worst_layers(report),
        "attribution": attribution_summary(report),
        "attribution_lead": ATTRIBUTED,
        "groups": fp32_groups(decisions),
        "islands": island_rows(report.plan.islands),
        "islands_lead": LEAD,
        "twice_lead": TWICE,
        "twice": [twice_text(weight) for weight in report.plan.stored_twice],
        "compiled": compiled_summary(report.compiled),
        "times": time_rows(report.inference.layer_times if report.inference else ()),
        "times_of": layer_times,
        "layers_text": layers_text,
        "ops_text": ops_text,
        "stays_fp32": stays_fp32,
        "gaps": gaps(report),
        "nodes": decisions[:_MAX_ROWS],
        "nodes_left": len(decisions) - len(decisions[:_MAX_ROWS]),
        "errors": {row.node: row for row in report.inference.nodes} if report.inference else {},
        "fp32_nodes": sum(map(stays_fp32, decisions)),
        "shares": _shares(report, decisions),
        **_training(report),
        "onnx": onnx_summary.onnx_summary(report),
        "onnx_runs": onnx_summary,
        "onnx_nodes": onnx_node_summary,
    }


def _training(report: RunReport) -> dict[str, object]:
    """What training.html.j2 takes besides."""
    parity = report.training
    if isinstance(parity, Unchecked):
        return {"parity": None}
    gradients, answer = parity.gradients, parity.noninferiority
    return {
        "parity": parity,
        "training": training_summary,
        "gradient": gradient_summary,
        "training_tiles": training_tiles(parity, report.verdict.checks),
        "training_rows": training_summary.training_rows(parity),
        "training_arms": training_summary.arms_shown(parity.run),
        "looks": training_summary.look_rows(answer) if answer else [],
        "loss_chart": training_charts.loss_chart(parity.run),
        "distance_chart": training_charts.distance_chart(parity.run),
        "scale_chart": training_charts.scale_chart(parity.run),
        "gradient_chart": gradient_chart.gradient_chart(gradients),
        "gradient_frame": gradient_chart,
        "ranges": gradient_summary.range_rows(gradients),
        "worst_gradients": gradient_summary.worst_gradients(gradients),
    }


def _bar(error: float | None) -> float:
    """Length of an error's bar, 0 to 100: a logarithmic scale from 1e-7 to 1."""
    if error is None or error <= 0:
        return 0.0
    if not math.isfinite(error):
        return 100.0
    return round(min(max((math.log10(error) + 7) / 7 * 100, 1.0), 100.0), 1)


def _shares(report: RunReport, decisions: tuple[NodeRecord, ...]) -> list[tuple[str, float, str]]:
    macs = sum(decision.macs for decision in decisions)
    plan = report.plan
    return [
        ("multiply-adds", plan.share_macs_low, f"{fmt.millions(macs)} in all"),
        ("nodes", plan.share_nodes_low, f"{plan.nodes:,} in all"),
    ]
