"""Fixtures of the tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import (
    MLP,
    Outcome,
    amp,
    write,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One run that passes, shared by the tests that only look at it, and its folder."""
    folder = tmp_path_factory.mktemp("mlp")
    write(folder, MLP)
    return folder, amp(folder, "model.py")
