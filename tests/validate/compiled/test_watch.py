"""What counts as another precision than the plan's."""

from __future__ import annotations

import pytest

from amp_convert.validate.compiled.results import OperatorCount
from amp_convert.validate.compiled.watch import PRODUCT, lowered, raised


@pytest.mark.parametrize(
    ("rows", "low", "wide"),
    [
        ([], 0, 0),
        ([("aten.exp", "float32", 2, 2)], 0, 0),
        ([("aten.exp", "float32", 2, 0), ("aten.exp", "float16", 0, 2)], 1, 0),
        # Some were low before: which ones, the counts do not say.
        ([("aten.sum", "float32", 2, 1), ("aten.sum", "bfloat16", 1, 2)], 0, 0),
        # Written by the compiler for something else.
        ([("aten.sum", "bfloat16", 0, 2)], 0, 0),
        ([(PRODUCT, "float32", 1, 1), (PRODUCT, "float16", 3, 3)], 0, 0),
        ([(PRODUCT, "float32", 1, 2), (PRODUCT, "float16", 3, 2)], 0, 1),
        ([(PRODUCT, "float32", 0, 1), (PRODUCT, "float16", 3, 2)], 0, 1),
        ([(PRODUCT, "float32", 2, 0), (PRODUCT, "float16", 0, 2)], 1, 0),
    ],
)
def test_lowered_and_raised(rows: list[tuple[str, str, int, int]], low: int, wide: int) -> None:
    counts = [OperatorCount(*row) for row in rows]
    assert (len(lowered(counts)), len(raised(counts))) == (low, wide)
