"""Answers from a cache: what is asked again is computed once, if nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.kept.answers import kept_in, kept_plainly
from amp_convert.capture.kept.fingerprint import of_call
from amp_convert.core.files.cache import Cache, Entry
from amp_convert.core.files.plain_data import PlainData


class Asked:
    """A model of which a number is asked; `computed` counts how often it had to be computed."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.computed, self.answer = Cache(folder), 0, 7.0
        self.model = nn.Linear(2, 2)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.ones_(self.model.bias)

    def ask(self, *, spoil: bool = False) -> Any:
        def compute() -> float:
            self.computed += 1
            if spoil:
                self.model.weight.data.add_(1)
            return self.answer

        with kept_in(self.cache):
            return kept_plainly("a number", lambda: of_call(self.model, ()), compute, PlainData())


@pytest.fixture
def asked(tmp_path: Path, no_other_tests: None) -> Asked:
    return Asked(tmp_path)


def test_what_was_asked_before_is_not_computed(asked: Asked) -> None:
    assert [asked.ask(), asked.ask()] == [7.0, 7.0]
    assert asked.computed == 1


def test_without_a_cache_it_is(asked: Asked) -> None:
    with kept_in(asked.cache), kept_in(None):
        kept_plainly("a number", lambda: "x", lambda: 1, PlainData())
    assert asked.cache.get("x") is None


def test_what_changes_the_model_while_it_is_computed_is_not_kept(asked: Asked) -> None:
    asked.ask(spoil=True)
    asked.model.weight.data.sub_(1)  # as it was when the first one was asked
    asked.ask()
    assert asked.computed == 2


def test_what_cannot_be_written_is_computed_each_time(asked: Asked) -> None:
    asked.answer = object()  # type: ignore[assignment]
    assert asked.ask() is asked.ask()
    assert asked.computed == 2


@pytest.mark.parametrize(
    "document",
    [None, [], {"answer": {"Secret": []}, "imported": {}}, {"answer": 1, "imported": ["a"]},
     {"answer": 1, "imported": {"/dev/zero": "none"}}, {"answer": 1, "imported": {"a\0b": "none"}},
     {"answer": 1, "imported": {"/nowhere": "none"}}, {"imported": {}}],
)  # fmt: skip
def test_a_foreign_entry_is_left_aside_and_written_anew(asked: Asked, document: Any) -> None:
    asked.ask()
    [path] = list(asked.cache._folder.iterdir())
    asked.cache.put(path.stem, Entry(document))
    asked.answer = 8.0
    assert [asked.ask(), asked.ask()] == [8.0, 8.0]
    assert asked.computed == 2
