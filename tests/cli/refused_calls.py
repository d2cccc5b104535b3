"""What tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from tests.command import amp


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder: Path, *arguments: str, code: int = 2) -> str:
    """The one line; the folder must be as it was."""
    before = entries(folder)
    outcome = amp(folder, *arguments)
    assert outcome.code == code
    assert entries(folder) == before
    return outcome.error
