"""What the gate shows."""

from __future__ import annotations

import io

from rich.console import Console

from amp_convert.gate.compare import GateResult
from amp_convert.gate.terminal import render


def shown(result: GateResult) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    render(console, result)
    output_file = console.file
    assert isinstance(output_file, io.StringIO)
    return output_file.getvalue()
