"""A sample of `make architectures`: what docs/architectures.md says of it is still so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.architectures import HEADS, judged
from tests.benchmarks.architectures_models import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SAMPLE = ["GCN", "CTC", "TransformerEncoder"]
NUMBERS = {"output error", "autocast's", "gradient error", "ONNX"}


def table() -> dict[str, dict[str, str]]:
    """The page's cells, by model and head."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert rows[0] == list(HEADS)
    return {row[0]: dict(zip(HEADS, row, strict=True)) for row in rows[1:]}


def test_it_has_thirty_architectures_of_many_sources() -> None:
    said = table()
    assert list(said) == [one.name for one in ARCHITECTURES]
    assert len(said) >= 30
    assert len({row["from"] for row in said.values()}) >= 6


def test_the_plan_on_the_eager_model_gives_the_converted_models_bits() -> None:
    assert sum(row["plan on eager"] == "same bits" for row in table().values()) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_still_so(name: str) -> None:
    """What works, word by word; errors within what another machine's kernels make of them."""
    [one] = [one for one in ARCHITECTURES if one.name == name]
    said, row = table()[name], judged(one)
    found = dict(zip(HEADS, row.cells, strict=True))
    assert {h: c for h, c in found.items() if h not in NUMBERS} == {
        h: c for h, c in said.items() if h not in NUMBERS
    }
    for head in NUMBERS:
        if said[head] in ("-", "written"):  # there is none, or ONNX Runtime crashes on it
            assert found[head] == said[head], head
        else:
            assert float(found[head]) < 3 * float(said[head]) + 1e-6, head
