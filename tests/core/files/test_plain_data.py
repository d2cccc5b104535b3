"""Values as JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.core.files.plain_data import NotPlainError, PlainData


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: Any
    colour: Colour = Colour.RED


PLAIN = PlainData(Point, Colour)

LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text()
    | st.complex_numbers(allow_nan=False)
    | st.floats(allow_nan=False) | st.just(Colour.RED)
    | st.sampled_from([torch.float16, torch.int64, torch.device("cpu"), torch.device("cuda", 1),
                       torch.strided, torch.sparse_coo, torch.channels_last])
)  # fmt: skip
HASHABLE = st.integers() | st.text() | st.sampled_from([torch.float16, Colour.RED])


@pytest.mark.slow
@given(
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(HASHABLE, inner)
            | st.frozensets(HASHABLE)
            | inner.map(Point)
        ),
    )
)
def test_what_was_written_is_read(value: Any) -> None:
    text = json.dumps(PLAIN.write(value), allow_nan=False)
    again = PLAIN.read(json.loads(text))
    assert again == value
    assert type(again) is type(value)


def test_a_number_that_is_none_is_read() -> None:
    assert math.isnan(PLAIN.read(PLAIN.write(math.nan)))


@pytest.mark.parametrize(
    "value", [object(), torch.zeros(1), print, [lambda: 0], {1: iter([])}, torch.Generator()]
)
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(NotPlainError):
        PLAIN.write(value)


@pytest.mark.parametrize(
    "data",
    [
        {"Secret": []}, {"dtype": "os"}, {"tuple": 3}, {"Point": [1, 2, 3, 4]}, {},
        {"a": 1, "b": 2},
        {"float": "1e400"}, {"device": "nowhere"}, {"dict": [[1]]}, {"Colour": "blue"},
    ],
)  # fmt: skip
def test_foreign_data_is_refused(data: Any) -> None:
    with pytest.raises(NotPlainError):
        PLAIN.read(data)
