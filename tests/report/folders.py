"""What tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from amp_convert.report import folder

REPORT = '{"schema_version": 1, "amp_convert": "0.1", "model": {}, "verdict": "%s"}'


OLD = {"report.json": REPORT % "old", "layers.csv": "old", "junit.xml": "old"}


NEW = {"report.json": REPORT % "new", "layers.csv": "new", "report.md": "neü"}


def content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in out.iterdir()}


def swap_in_one_step(tmp_path: Path) -> bool:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    works = folder._exchange_in_one_step(first, second)
    first.rmdir()
    second.rmdir()
    return works
