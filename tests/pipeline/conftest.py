"""Fixtures of the tests in this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amp_convert import pipeline
from amp_convert.loading import user_code as usercode
from amp_convert.loading.settings import Settings
from amp_convert.pipeline import Run
from tests.pipeline.pipeline_models import Recorder


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test works in its own folder, and leaves sys.path and sys.modules as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(usercode, "_names", {})
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Run]:
    def convert(text: str, progress: Recorder | None = None, **settings: object) -> Run:
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        chosen = Settings(**settings)  # type: ignore[arg-type]
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return pipeline.convert("model.py", chosen, progress or Recorder(), work)

    return convert
