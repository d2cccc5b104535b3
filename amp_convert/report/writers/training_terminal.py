"""The training section on the terminal: the figures of all arms, and what they mean."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from amp_convert.report import text as fmt
from amp_convert.report.sections.gradient_summary import (
    advice_text,
    gradient_remarks,
    gradient_text,
    underflow_text,
)
from amp_convert.report.sections.training_summary import (
    ARMS_TEXT,
    arms_shown,
    noise_text,
    remarks,
    training_rows,
)
from amp_convert.validate.training.results import TrainingParity

_QUANTITY, _CELL, _PROSE = 22, 16, 300
_MAX_REMARKS = 3
_ANSWERS = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def training_body(parity: TrainingParity) -> list[RenderableType]:
    """The section below its heading."""
    figures = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    figures.add_column("", no_wrap=True)
    arms = arms_shown(parity.run)
    for arm in arms:
        figures.add_column(arm, justify="right", style="bold" if arm == "mixed" else "")
    for row in training_rows(parity):
        if not row.detail:
            cells = (Text(fmt.clip(row.values.get(arm, ""), _CELL)) for arm in arms)
            figures.add_row(Text(fmt.clip(row.quantity, _QUANTITY)), *cells)
    facts = Table.grid(padding=(0, 2), pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(parity):
        facts.add_row(name, text)
    stopped = [Text(_shown(remark), style="yellow") for remark in remarks(parity)]
    return [*stopped, *([figures] if arms else []), facts]


def _facts(parity: TrainingParity) -> list[tuple[str, Text]]:
    gradients, answer = parity.gradients, parity.noninferiority
    found = []
    if answer is not None:
        reason = f" {_shown(parity.metric)}: {_shown(answer.reason)}"
        found.append(
            ("over seeds", Text.assemble((answer.status, _ANSWERS[answer.status]), reason))
        )
    found.append(("gradients", Text(f"of one step: {gradient_text(gradients)}")))
    warnings = gradient_remarks(gradients)[:_MAX_REMARKS]
    found += [("", Text(_shown(warning), style="yellow")) for warning in warnings]
    found.append(("FP16 underflow", Text(underflow_text(gradients))))
    found.append(("static scale", Text(_shown(advice_text(gradients, why=False)))))
    if noise := noise_text(parity):
        found.append(("noise", Text(noise)))
    return [*found, ("arms", Text(ARMS_TEXT, style="dim"))]


def _shown(text: str) -> str:
    return fmt.clip(fmt.printable(text), _PROSE)
