"""One layer or node on one page of a terminal."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp_convert import __version__
from amp_convert.report import text as fmt
from amp_convert.report.model import Section
from amp_convert.report.sections.attribution import DOUBTS
from amp_convert.report.sections.explanation import Explanation, NodeExplanation
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.writers.json_report import json_text
from amp_convert.report.writers.terminal import heading, indented

_MOST_CAUSES = 8


class ExplainReport(Section):
    """The page, as `amp-convert explain --json` prints it."""

    schema_version: Literal[1] = 1
    amp_convert: str = __version__
    explanation: Explanation


def explanation_json(found: Explanation) -> str:
    """The page as strict JSON; numbers that JSON lacks are text."""
    return json_text(ExplainReport(explanation=found))


def render_explanation(console: Console, found: Explanation) -> None:
    """Print the page."""
    console.print(heading(fmt.printable(layer_name(found.layer)), _note(found)))
    if found.no_budget:
        console.print(Text(f"its part of the error is not known: {fmt.printable(found.no_budget)}"))
    if found.doubts:
        said = "; ".join(DOUBTS[doubt] for doubt in found.doubts)
        error = fmt.error(found.measured_rel_l2)
        console.print(Text(f"the outputs' error was measured as {error}; {said}"))
    for node in found.nodes:
        console.print()
        console.print(Text.assemble((fmt.printable(node.node), "bold"), f"  {node.dtype}"))
        console.print(indented(_facts(node, found)))
        if node.rule:
            console.print(indented(Text("to change it, in a rules file:", style="dim")))
            console.print(
                indented(indented(Text("\n".join(map(fmt.printable, node.rule.splitlines())))))
            )


def _note(found: Explanation) -> str:
    time = found.time
    if time is None:
        return f"{fmt.count(len(found.nodes), 'node')}, for {found.dtype}"
    times = f"{fmt.milliseconds(time.fp32)} in FP32, {fmt.milliseconds(time.frozen)} frozen"
    return f"{fmt.count(len(found.nodes), 'node')}, for {found.dtype}; {times}"


def _facts(node: NodeExplanation, found: Explanation) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in _said(node, found):
        table.add_row(name, Text(fmt.printable(said)))
    return table


def _said(node: NodeExplanation, found: Explanation) -> list[tuple[str, str]]:
    rows = [("why", f"{node.why} ({node.kind})")]
    rows += [
        ("since" if not index else "", f"{link.node}: {link.reason} [{link.source}]")
        for index, link in enumerate(node.causes[:_MOST_CAUSES])
    ]
    seed = node.causes[-1] if node.causes else None
    if evidence := node.evidence or (seed.evidence if seed else ""):
        rows.append(("measured", evidence))
    if node.location:
        rows.append(("place", node.location))
    if node.abs_max is not None:
        probed = f", {fmt.number(node.probed)} on other inputs" if node.probed is not None else ""
        rows.append(("largest value", f"{fmt.number(node.abs_max)} in calibration{probed}"))
    if casts := [dtype or "as it is" for dtype in node.inputs]:
        rows.append(("reads", ", ".join(casts)))
    if node.share is not None:
        share = node.share
        floor = f"; in FP32 {fmt.error(share.floor_rel_l2)}" if share.floor_rel_l2 else ""
        tried = f"; tried alone {fmt.error(share.trial_rel_l2)}" if share.trial_rel_l2 else ""
        rows.append(
            (
                "adds",
                f"{fmt.error(share.rel_l2)} to the outputs' error of "
                f"{fmt.error(found.predicted_rel_l2)} ({fmt.percent(share.share)} of its square)"
                f"{floor}{tried}",
            )
        )
    if node.macs:
        rows.append(("work", f"{fmt.count(node.macs, 'multiply-add')}"))
    return rows
