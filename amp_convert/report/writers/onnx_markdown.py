"""The ONNX section of report.md."""

from __future__ import annotations

from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.sections.onnx_node_summary import (
    FIRSTS_TEXT,
    NODES_TEXT,
    FirstNode,
    NodeRow,
)
from amp_convert.report.sections.onnx_summary import RUNS_TEXT, OnnxSummary, RunRow
from amp_convert.report.writers.markdown import code, escape, table


def onnx_lines(onnx: OnnxSummary | None) -> list[str]:
    """The lines of the section; none where nothing was exported."""
    if onnx is None:
        return []
    return [
        "## ONNX",
        "",
        f"{escape(onnx.title)}.",
        *(f"**{escape(remark)}.**" for remark in onnx.remarks),
        "",
        *(f"- {escape(fact.name)}: {escape(fact.value)}" for fact in onnx.facts),
        "",
        f"{RUNS_TEXT}.",
        "",
        *_runs(onnx.runs),
        *_metrics(onnx),
        "",
        f"{FIRSTS_TEXT}:",
        "",
        *(f"- {first.title}: {_first(first)}" for first in onnx.firsts),
        *_worst(onnx.worst),
    ]


def _runs(runs: tuple[RunRow, ...]) -> list[str]:
    rows = [
        [
            row.arm,
            f"{row.batches:,}",
            row.against_fp32,
            row.against_converted,
            row.distance,
            row.limit,
            code(row.output),
            "**NO**" if row.status == "fail" else row.agrees,
            escape("; ".join(row.notes)),
        ]
        for row in runs
    ]
    errors = ["from FP32", "from converted", "distance", "limit"]
    return table(["run", "batches", *errors, "output", "within", "remark"], rows, numbers="12345")


def _metrics(onnx: OnnxSummary) -> list[str]:
    rows = [[escape(row.name), row.fp32, row.converted, row.onnx] for row in onnx.metrics]
    if not rows:
        return []
    return [
        "",
        f"{onnx.metrics_text}.",
        "",
        *table(["metric", "fp32", "converted", "onnx"], rows, numbers="123"),
    ]


def _first(first: FirstNode) -> str:
    if first.node is None:
        return escape(first.text)
    node = first.node
    errors = f"local {fmt.error(node.local) or 'not measured'}, accumulated "
    errors += fmt.error(node.accumulated) or "not measured"
    place = f" at {code(node.location)}" if node.location else ""
    return f"{code(layer_name(node.layer))} {code(node.op)}{place}, {errors}"


def _worst(nodes: tuple[NodeRow, ...]) -> list[str]:
    rows = [
        [
            fmt.error(node.local),
            fmt.error(node.accumulated),
            code(layer_name(node.layer)),
            code(node.op),
            code(node.dtype),
            code(node.onnx_ops),
            node.ran,
            "**YES**" if node.parts else "no",
            code(node.location),
        ]
        for node in nodes
    ]
    if not rows:
        return []
    header = ["local", "accumulated", "layer", "op", "dtype", "ONNX", "ran", "parts", "place"]
    return ["", f"{NODES_TEXT}.", "", *table(header, rows, numbers="01")]
