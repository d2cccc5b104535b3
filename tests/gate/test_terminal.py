"""The gate's result as text."""

from __future__ import annotations

from tests.evidence import (
    decision,
    divergence,
    gated,
    node_error,
    report,
)
from tests.gate.shown_findings import shown


def test_names_from_the_model_are_not_markup() -> None:
    node = decision("[red]x[/red]\x1b[31m/aten.linear#0")
    rows = [node_error(node.node, local_rel_l2=error) for error in (1e-3, 9e-3)]
    before, now = (report(decisions=(node,), inference=divergence(nodes=(row,))) for row in rows)
    text = shown(gated(now, before))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
