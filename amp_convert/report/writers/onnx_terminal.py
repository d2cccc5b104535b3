"""The ONNX section on the terminal: how far each run is off, and where it begins."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from amp_convert.report import text as fmt
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.sections.onnx_node_summary import FirstNode
from amp_convert.report.sections.onnx_summary import OnnxSummary, RunRow

_LAYER, _NAME, _PLACE, _CELL, _PROSE = 40, 22, 32, 14, 200
_MAX_METRICS = 6
_STATUS = {"pass": "green", "fail": "bold red", "unchecked": "yellow"}


def onnx_body(onnx: OnnxSummary) -> list[RenderableType]:
    """The section below its heading."""
    facts = Table.grid(padding=(0, 2), pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for fact in onnx.facts:
        if not fact.detail:
            facts.add_row(Text(fact.name), Text(_shown(fact.value)))
    for first in onnx.firsts:
        facts.add_row(Text(first.title), _first(first))
    remarks = [*onnx.remarks, *(f"{row.arm}: {note}" for row in onnx.runs for note in row.notes)]
    warnings = [Text(_shown(remark), style="yellow") for remark in remarks]
    return [_runs(onnx.runs), *warnings, *([_metrics(onnx)] if onnx.metrics else []), facts]


def _runs(runs: tuple[RunRow, ...]) -> Table:
    table = _figures("run", "from FP32", "from converted", "distance", "limit")
    table.add_column("within")
    for row in runs:
        cells = (row.against_fp32, row.against_converted, row.distance, row.limit)
        agrees = Text(row.agrees, style=_STATUS[row.status])
        table.add_row(Text(row.arm), *map(Text, cells), agrees)
    return table


def _metrics(onnx: OnnxSummary) -> Table:
    table = _figures("metric", "fp32", "converted", "onnx")
    for row in onnx.metrics[:_MAX_METRICS]:
        cells = (Text(fmt.clip(cell, _CELL)) for cell in (row.fp32, row.converted, row.onnx))
        table.add_row(Text(fmt.clip(fmt.printable(row.name), _NAME)), *cells)
    return table


def _figures(name: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _first(first: FirstNode) -> Text:
    node = first.node
    if node is None:
        return Text(_shown(first.text))
    name = fmt.tail(layer_name(node.layer), _LAYER)
    place = f"  {fmt.tail(fmt.printable(node.location), _PLACE)}" if node.location else ""
    op = fmt.clip(fmt.printable(node.op), _NAME)
    return Text.assemble(name, (f"\n{op}{place}", "dim"))


def _shown(text: str) -> str:
    return fmt.clip(fmt.printable(text), _PROSE)
