"""Sums of outputs' errors, for what has no counterpart."""

from __future__ import annotations

import math

import torch

from amp_convert.validate.inference.output_errors import OutputSums, accumulate


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
