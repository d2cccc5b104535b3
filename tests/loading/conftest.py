"""Fixtures of the tests in this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amp_convert.loading import user_code as usercode
from amp_convert.loading.model_file import Case, load_case


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts with nothing loaded, and leaves sys.path and sys.modules as they were."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(usercode, "_names", {})
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


Load = Callable[..., Case]
Write = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, attribute: str = "") -> Case:
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        return load_case(f"{tmp_path}/model.py{attribute}")

    return load


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model file in nets/, with a pyproject.toml above it that ends every search."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/model.py").write_text("raise SystemExit('must not be run')")
    return f"{tmp_path}/nets/model.py"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "model.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
