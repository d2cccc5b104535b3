"""Fixtures of the tests in this folder."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.examples.example_files import load


@pytest.fixture(scope="module")
def char_gpt() -> ModuleType:
    return load("char_gpt")


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    return load("minilm")
