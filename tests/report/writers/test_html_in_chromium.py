"""report.html in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from amp_convert.report import RunReport
from amp_convert.report.writers.html_report import html_text

_CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--window-size=1200,1600",
)  # fmt: skip


def _console(folder: Path, text: str) -> list[str]:
    """Render `text` in Chromium; what the page wrote to the console."""
    page, shot = folder / "page.html", folder / "page.png"
    page.write_text(text, encoding="utf-8")
    assert _CHROMIUM is not None
    command = [
        _CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}",
        page.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert shot.stat().st_size > 10_000
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_renders_without_a_console_message(
    hostile_report: RunReport, tmp_path: Path
) -> None:
    text = html_text(hostile_report)
    assert _console(tmp_path, text) == []
    # The oracle itself: a script that slipped through would be refused, and be seen here.
    assert _console(tmp_path, text.replace("</main>", "<script>alert(1)</script></main>"))
