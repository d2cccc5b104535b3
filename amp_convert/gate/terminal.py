"""The gate's result as a terminal shows it."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from amp_convert.gate.compare import ON_NODES, GateResult, by_layer
from amp_convert.report.sections.grouping import layer_name
from amp_convert.report.text import count, quantity
from amp_convert.report.writers.terminal import short


def _shown(value: float | str | None) -> str:
    return "-" if value is None else quantity(value)


def render(console: Console, result: GateResult) -> None:
    """Print the result: status, what got worse by layer with the worst node, then the notes."""
    colour = {"pass": "green", "fail": "red", "inconclusive": "yellow"}[result.status]
    console.print(
        Text.assemble(
            (f" {result.status.upper()} ", f"bold reverse {colour}"),
            f"  gate: {count(result.compared, 'node')} compared with the baseline, ",
            f"{count(len(result.findings), 'finding')}",
        )
    )
    for finding, number in by_layer(result.findings):
        where = layer_name(finding.layer) if finding.kind in ON_NODES else finding.subject
        node = f" in {short(finding.subject)}" if finding.kind in ON_NODES else ""
        more = f", worst of {number} findings" if number > 1 else ""
        change = f"{_shown(finding.before)} -> {_shown(finding.after)}{node}{more}"
        body = Text(f"{change}\n{short(finding.reason, 300)}")
        console.print(Text.assemble((f"{finding.kind}  ", "red"), (short(where), "bold")))
        console.print(Padding(body, (0, 0, 0, 2), expand=False))
    for note in result.notes:
        console.print(Text(f"note: {short(note, 300)}", style="dim"))
