"""The page on attribution has every model, and the program behind it finds what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.attribution import is_fault, judged
from tests.zoo import BUILDERS, DTYPES

PAGE = Path(__file__).parents[1] / "docs" / "attribution.md"


def test_the_page_has_every_model_and_no_fault() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| model")
    ]
    assert {(row[0], row[1]) for row in rows} == {
        (name, str(dtype).removeprefix("torch.")) for name in BUILDERS for dtype in DTYPES
    }
    assert all(0.5 < float(row[4]) < 2 for row in rows if row[9] == "none")


@pytest.mark.slow
def test_a_row_is_made_and_a_wrong_one_is_a_fault() -> None:
    row = judged("cnn", torch.float16)
    assert not is_fault(row)
    assert float(row.correlation) >= 0.8
    assert is_fault(replace(row, ratio="2.5"))
    assert not is_fault(replace(row, ratio="2.5", doubts="additivity"))
