"""The result on the terminal: the verdict, then why, within 80 columns.

Order: verdict and failed checks, headline figures of all arms, the layers of largest error, where
the error comes from, training, ONNX, what stays FP32 and why, what was not checked, where the
report is. Everything is built from `Text`, so no name from the model is read as markup; colour and
width are the console's own affair.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from amp_convert.plan.plan import DecisionKind
from amp_convert.report import text as fmt
from amp_convert.report.model import RunReport
from amp_convert.report.sections.archive import archive_text
from amp_convert.report.sections.attribution import AttributionSummary, attribution_summary
from amp_convert.report.sections.eager_plan import eager_plan_text
from amp_convert.report.sections.gaps import Gap, gaps
from amp_convert.report.sections.grouping import (
    Fp32Group,
    fp32_groups,
    layer_name,
    layers_text,
    ops_text,
)
from amp_convert.report.sections.onnx_summary import OnnxSummary, onnx_summary
from amp_convert.report.sections.summary import (
    ARMS,
    WorstLayer,
    casts_text,
    comparison,
    precision_text,
    verdict_sentence,
    worst_layers,
)
from amp_convert.report.sections.training_summary import steps_text
from amp_convert.report.writers.onnx_terminal import onnx_body
from amp_convert.report.writers.training_terminal import training_body
from amp_convert.validate.training.results import TrainingParity
from amp_convert.verdict.check import CheckStatus
from amp_convert.verdict.verdict import VerdictStatus

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "unchecked": "yellow"}
_MAX_GROUPS = 8
_MAX_GAPS = 12
_MAX_SOURCES = 5
_NAME = 54
_PLACE = 32
_ROOM = 55  # columns that the worst layers' figures leave for their names
_NOTE = 68
_PROSE = 300


def render(console: Console, report: RunReport, folder: Path | None) -> None:
    """Print the whole result; `folder` is where the report was written, None when it was not."""
    sections: list[RenderableType] = [_verdict(report)]
    if failed := _failed_checks(report):
        sections.append(failed)
    sections.append(_headline(report))
    if worst := _worst(report):
        sections.append(worst)
    if attributed := attribution_summary(report, most=_MAX_SOURCES):
        sections.append(_attribution(attributed))
    if isinstance(report.training, TrainingParity):
        sections.append(_training(report.training))
    if onnx := onnx_summary(report):
        sections.append(_onnx(onnx))
    sections.append(_fp32(report))
    blocking, missing = _gaps(report)
    if blocking:
        sections.insert(1, gap_section("Inconclusive, since these were not checked", blocking))
    if missing:
        sections.append(gap_section("Not checked", missing))
    for section in sections:
        console.print(section)
        console.print()
    if folder is not None:
        # Soft-wrapped, so that a long path can still be copied whole.
        console.print(Text(f"Report: {folder}/report.html"), soft_wrap=True)


def heading(text: str, note: str = "") -> Text:
    """A section's first line."""
    return Text.assemble((text, "bold"), (f"  {note}" if note else "", "dim"))


def indented(*body: RenderableType) -> Padding:
    """A section's body, two columns in."""
    return Padding(Group(*body), (0, 0, 0, 2), expand=False)


def short(text: str, width: int = _NAME) -> str:
    """A text from the model, made printable and cut to `width` characters."""
    return fmt.clip(fmt.printable(text), width)


def short_layer(layer: str) -> str:
    """A layer's name, its first parts left out where it is too long."""
    return fmt.tail(layer_name(layer), _NAME)


def place(location: str) -> str:
    """ "  modeling_bert.py:41" to go behind a name; empty for an unknown location."""
    return f"  {fmt.tail(fmt.printable(location), _PLACE)}" if location else ""


def error_text(value: float | None) -> Text:
    """A relative error; one that is not finite stands out."""
    text = fmt.error(value)
    return Text(text, style="bold red" if text in ("nan", "inf", "-inf") else "")


def _verdict(report: RunReport) -> RenderableType:
    status = report.verdict.status
    plan = report.plan
    first = Text.assemble(
        (f" {status.upper()} ", f"bold reverse {_COLOURS[status]}"),
        "  ",
        (short(report.model.name), "bold"),
        f"  {plan.dtype} on {plan.device}",
    )
    second = f"{verdict_sentence(report)}; rules {', '.join(plan.rules)}"
    return Group(first, Text(fmt.printable(second), style="dim"))


def _failed_checks(report: RunReport) -> RenderableType | None:
    failed = [check for check in report.verdict.checks if check.status == "fail"]
    if not failed:
        return None
    lines: list[RenderableType] = []
    for check in failed:
        measured = f"  {short(fmt.quantity(check.value))}" if check.value is not None else ""
        limit = ""
        if check.threshold is not None:
            limit = f", limit {short(fmt.quantity(check.threshold))}"
        lines.append(Text.assemble((short(check.name), "bold red"), measured + limit))
        lines.append(indented(Text(short(check.reason, _PROSE))))
    return Group(heading("Failed checks"), indented(*lines))


def _gaps(report: RunReport) -> tuple[list[Gap], list[Gap]]:
    """What was not checked: what makes the verdict inconclusive, and the rest."""
    found = gaps(report)
    if report.verdict.status != VerdictStatus.INCONCLUSIVE:
        return [], found
    checks = report.verdict.checks
    blocking = {c.name for c in checks if c.required and c.status == CheckStatus.UNCHECKED}
    first = [gap for gap in found if not blocking.isdisjoint(gap.checks)]
    return first, [gap for gap in found if gap not in first]


def _headline(report: RunReport) -> RenderableType:
    rows = comparison(report)
    arms = [arm for arm in ARMS if any(getattr(row, arm) for row in rows)]
    figures = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    figures.add_column("", min_width=14)
    for arm in arms:
        figures.add_column(arm, justify="right", style="bold" if arm == "mixed" else "")
    for row in rows:
        figures.add_row(Text(short(row.quantity, 32)), *(Text(getattr(row, arm)) for arm in arms))
    body: list[RenderableType] = [figures] if rows else []
    return Group(heading("Against FP32"), indented(*body, *_plan_lines(report)))


def _plan_lines(report: RunReport) -> list[Text]:
    return [
        Text(f"low precision  {precision_text(report)}"),
        Text(f"casts          {casts_text(report)}"),
        *([Text(f"eager model    {said}")] if (said := eager_plan_text(report)) else []),
        *([Text(f"archive        {said}")] if (said := archive_text(report)) else []),
    ]


def _worst(report: RunReport) -> RenderableType | None:
    layers = worst_layers(report)
    if not layers:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("accumulated", justify="right", no_wrap=True)
    table.add_column("local", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold")
    for layer in layers:
        table.add_row(error_text(layer.accumulated), error_text(layer.local), _worst_text(layer))
    note = "relative error; local: given the FP32 inputs"
    title = f"{len(layers)} worst layers" if len(layers) > 1 else "Worst layer"
    return Group(heading(title, note), indented(table))


def _worst_text(layer: WorstLayer) -> Text:
    """The layer, then its worst node; the place goes where it still fits on a line."""
    name, where = short_layer(layer.layer), place(layer.location)
    node = f"{short(layer.op)}  {layer.dtype}"
    if len(node + where) > _ROOM >= len(name + where):
        return Text.assemble(name, (f"{where}\n{node}", "dim"))
    return Text.assemble(name, (f"\n{node}{where}", "dim"))


def _attribution(found: AttributionSummary) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for figure in ("share", "adds", *(["tried alone"] if found.tried else [])):
        table.add_column(figure, justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold")
    for row in found.rows:
        tried = [error_text(row.tried)] if found.tried else []
        layer, op = short_layer(row.layer), short(row.op)
        apart = "  " if len(layer + op) + 2 <= _ROOM - (13 if found.tried else 0) else "\n"
        name = Text.assemble(layer, (f"{apart}{op}", "dim"))
        table.add_row(fmt.percent(row.share), error_text(row.rel_l2), *tried, name)
    note = Text(fmt.printable(found.text), style="dim")
    return Group(heading("Where the error comes from"), indented(note, table))


def _training(training: TrainingParity) -> RenderableType:
    note = short(steps_text(training), _NOTE)
    return Group(heading("Training", note), indented(*training_body(training)))


def _onnx(onnx: OnnxSummary) -> RenderableType:
    return Group(heading("ONNX", short(onnx.title, _NOTE)), indented(*onnx_body(onnx)))


def _fp32(report: RunReport) -> RenderableType:
    groups = fp32_groups(report.plan.decisions)
    if not groups:
        return heading("Stays FP32", "no node: everything computes in low precision")
    nodes = sum(group.nodes for group in groups)
    share = fmt.percent(sum(group.macs_share for group in groups))
    note = f"{fmt.count(nodes, 'node')}, {share} of the multiply-adds"
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for group in groups[:_MAX_GROUPS]:
        table.add_row(Text(f"{group.nodes:,}"), group_text(group))
    rest = len(groups) - _MAX_GROUPS
    more = [Text(f"... and {fmt.count(rest, 'more reason')} in layers.csv")] if rest > 0 else []
    return Group(heading("Stays FP32", note), indented(table, *more))


def group_text(group: Fp32Group) -> Text:
    """One reason: the layers, what computes there, why, by which rule, and what a guard measured.

    Under any other rule the measured range is not the reason; the audit and layers.csv have it.
    """
    by_guard = group.kind is DecisionKind.GUARD
    return reason_text(
        layers_text(group.layers) + "\n",
        f"{ops_text(group.ops)}: {short(group.reason, _PROSE)}\n",
        rule_text(group.rule, group.source),
        group.evidence if by_guard else "",
        group.location,
        stands_out=by_guard,
    )


def rule_text(rule: str, source: str) -> str:
    """The rule and the line that it stands on, where it stands in a file."""
    return f"{rule}, {source}" if ":" in source else rule


def reason_text(
    layers: str, why: str, rule: str, evidence: str, location: str, *, stands_out: bool
) -> Text:
    """The lines that say why nodes stay FP32; where it `stands_out`, the evidence is the reason."""
    measured = f"measured: {short(evidence, _PROSE)}\n" if evidence else ""
    return Text.assemble(
        (layers, "bold"),
        why,
        (measured, "" if stands_out else "dim"),
        (f"[{short(rule)}]{place(location)}", "dim"),
    )


def gap_section(title: str, missing: list[Gap]) -> RenderableType:
    """What was not checked or not covered, one line each."""
    rows = [
        Text(f"{short(gap.what, 80)}: {short(gap.reason, _PROSE)}") for gap in missing[:_MAX_GAPS]
    ]
    rest = len(missing) - _MAX_GAPS
    more = [Text(f"... and {rest:,} more in report.md")] if rest > 0 else []
    return Group(heading(title), indented(*rows, *more))
