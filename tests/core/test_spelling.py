"""The nearest known word."""

from __future__ import annotations

import pytest

from amp_convert.core.spelling import nearest

KNOWN = ["dtype", "device", "steps"]


@pytest.mark.parametrize(
    ("word", "found"),
    [("dtpe", "dtype"), ("devices", "device"), ("zzz", ""), ("", ""), ("dtype" * 100, "")],
)
def test_the_nearest_word(word: str, found: str) -> None:
    assert nearest(word, KNOWN) == found


def test_nothing_is_near_to_a_word_of_a_file_that_is_a_book() -> None:
    assert nearest("x" * 10**6, ["x" * 10**6]) == ""
