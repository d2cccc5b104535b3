"""Sums of outputs' errors, for what has no counterpart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amp_convert.validate.inference.output_errors import OutputSums, accumulate

X = torch.arange(1.0, 7.0).reshape(2, 3)


def test_an_output_of_another_shape_has_no_small_error() -> None:
    sums = OutputSums(torch.float32)
    sums.add(torch.zeros(3, 4), torch.zeros(4, 3))
    row = sums.row("output")
    assert row.mismatches == 12
    assert math.isnan(row.max_abs_err)
    assert math.isnan(row.rel_l2)


def test_leaves_are_matched_by_name() -> None:
    """What is missing differs; what is no number is compared as it is."""
    sums: dict[str, OutputSums] = {}
    reference = {"x": torch.ones(2, 3), "n": 3, "kind": "a", "ids": torch.tensor([1, 2, 3])}
    accumulate(
        sums, reference, {"x": torch.full((2, 3), 1.5), "ids": torch.tensor([1, 0, 3]), "n": 3}
    )
    rows = {name: total.row(name) for name, total in sums.items()}
    assert rows["x"].rel_l2 == 0.5
    assert (rows["x"].max_abs_err, rows["x"].elements) == (0.5, 6)
    assert rows["ids"].mismatches == 1
    assert rows["kind"].mismatches == 1
    assert "n" not in rows


@pytest.mark.parametrize(
    ("reference", "value", "name", "fp32", "mixed"),
    [
        ({"a": X}, {"a": X, "b": X}, "b", "nothing", "2 x 3"),
        ({"a": X, "b": X}, {"a": X}, "b", "2 x 3", "nothing"),
        ([X, X], [X], "[1]", "2 x 3", "nothing"),
        ([X], [X, X], "[1]", "nothing", "2 x 3"),
        ({"a": X[:0]}, {"a": X}, "a", "0 x 3", "2 x 3"),
        ({"a": X}, {"a": X[:0]}, "a", "2 x 3", "0 x 3"),
        ({"a": X[:0]}, {"a": X[:0, :2]}, "a", "0 x 3", "0 x 2"),
        ({"a": X}, {"a": None}, "a", "2 x 3", "a NoneType"),
        ({"a": torch.tensor(1.0)}, {"a": 1.0}, "a", "a number", "a float"),
        ({"a": 3}, {}, "a", "a int", "nothing"),
    ],
)
def test_structure_is_compared_both_ways(
    reference: Any, value: Any, name: str, fp32: str, mixed: str
) -> None:
    sums: dict[str, OutputSums] = {}
    accumulate(sums, reference, reference)
    accumulate(sums, reference, value)
    row = sums[name].row(name)
    assert row.misfits == 1
    assert row.misfit is not None
    assert (row.misfit.fp32, row.misfit.mixed) == (fp32, mixed)
    others = [total.row("") for other, total in sums.items() if other != name]
    assert all(other.misfits == 0 for other in others)


def test_complex_outputs_count_by_their_elements() -> None:
    want = torch.complex(X, X)
    have = want.clone()
    have[0, 0] = complex(float("inf"), float("nan"))
    have[1, 1] = complex(float("nan"), 0.0)
    sums = OutputSums(torch.complex64)
    sums.add(want, have, want)
    row = sums.row("output")
    assert (row.elements, row.nonfinite, row.dtype) == (6, 2, "complex64")


def test_a_noisy_reference_is_measured_beside() -> None:
    sums = OutputSums(torch.float32)
    sums.add(X, X * 1.5, X * 1.25)
    row = sums.row("output")
    assert (row.rel_l2, row.noise_rel_l2) == (0.5, 0.25)
    assert row.noise_max_abs == float(X.abs().max()) / 4
