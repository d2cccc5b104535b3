"""Guards at their limits: what fires, on which value, and the evidence that it gives."""

from __future__ import annotations

import math

import pytest
import torch

from amp_convert.guards import (
    Finding,
    Measured,
    activation_range,
    first_finding,
    weight_range,
    weight_tiny,
)
from amp_convert.profile import Range
from amp_convert.rules import Guards

F16, BF16 = torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf
LARGEST = 65504.0
LARGEST_BF16 = torch.finfo(BF16).max


def activations(*values: float, batches: int = 1) -> Measured:
    named = zip(("its result", "an input", "an input"), map(Range, values), strict=False)
    return Measured(tuple(named), (), batches)


def weight(abs_max: float, tiny_share: float | None = 0.0) -> Measured:
    return Measured((), (("encoder.weight", Range(abs_max, tiny_share)),), 3)


# --- activation range ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "headroom", "dtype", "fires"),
    [
        (LARGEST / 2, 2.0, F16, False),  # the limit itself still fits
        (math.nextafter(LARGEST / 2, INF), 2.0, F16, True),
        (LARGEST, 1.0, F16, False),
        (LARGEST, 1.001, F16, True),
        (100.0, 1000.0, F16, True),
        (70000.0, 0.5, F16, False),
        (1e30, 2.0, BF16, False),
        (LARGEST_BF16, 1.0, BF16, False),
        (LARGEST_BF16, 2.0, BF16, True),
        (0.0, 2.0, F16, False),
        (NAN, 2.0, F16, True),
        (NAN, 2.0, BF16, True),
        (INF, 2.0, F16, True),
        (INF, 2.0, BF16, True),
    ],
)
def test_activations_keep_their_head_room(
    value: float, headroom: float, dtype: torch.dtype, fires: bool
) -> None:
    found = activation_range(activations(value), Guards(activation_headroom=headroom), dtype)
    assert (found is not None) == fires


def test_an_input_counts_as_much_as_the_result() -> None:
    found = activation_range(activations(1.0, 2.0, 60000.0, batches=4), Guards(), F16)
    assert found == Finding(
        "activation-range",
        "an input comes too near to the largest float16 number, 65504 (head room 2)",
        "abs max 60000 in 4 batches",
    )


def test_the_result_comes_first() -> None:
    found = activation_range(activations(71234.0, 99999.0), Guards(activation_headroom=1.5), F16)
    assert found == Finding(
        "activation-range",
        "its result comes too near to the largest float16 number, 65504 (head room 1.5)",
        "abs max 71234 in 1 batch",
    )


@pytest.mark.parametrize(("value", "text"), [(NAN, "nan"), (INF, "inf")])
def test_the_evidence_says_what_was_seen_of_a_value_that_is_no_number(
    value: float, text: str
) -> None:
    found = activation_range(activations(value, batches=2), Guards(), BF16)
    assert found is not None
    assert found.evidence == f"abs max {text} in 2 batches"
    assert "bfloat16 number, 3.3895e+38" in found.reason


def test_nothing_measured_nothing_found() -> None:
    assert first_finding(Measured((), (), 0), Guards(), F16) is None


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "headroom", "dtype", "fires"),
    [
        (LARGEST, 1.0, F16, False),
        (65536.0, 1.0, F16, True),
        (LARGEST, 2.0, F16, True),
        (1e9, 1.0, BF16, False),
        (NAN, 1.0, BF16, True),
        (INF, 1.0, BF16, True),
    ],
)
def test_weights_fit_their_dtype(
    value: float, headroom: float, dtype: torch.dtype, fires: bool
) -> None:
    found = weight_range(weight(value), Guards(weight_headroom=headroom), dtype)
    assert (found is not None) == fires


def test_the_evidence_names_the_weight() -> None:
    assert weight_range(weight(1e6), Guards(), F16) == Finding(
        "weight-range",
        "weight encoder.weight does not fit float16, whose largest number is 65504",
        "abs max 1e+06",
    )


@pytest.mark.parametrize(
    ("share", "limit", "dtype", "fires"),
    [
        (0.5, 0.5, F16, False),
        (0.501, 0.5, F16, True),
        (1.0, 0.5, F16, True),
        (1.0, 1.0, F16, False),
        (0.1, 0.05, F16, True),
        (None, 0.5, F16, False),
        (1.0, 0.5, BF16, False),  # BF16 has FP32's exponents
    ],
)
def test_most_of_a_weight_keeps_its_digits(
    share: float | None, limit: float, dtype: torch.dtype, fires: bool
) -> None:
    found = weight_tiny(weight(1e-5, share), Guards(weight_tiny_share=limit), dtype)
    assert (found is not None) == fires


def test_the_evidence_says_how_much_of_the_weight() -> None:
    assert weight_tiny(weight(1e-5, 0.9456), Guards(), F16) == Finding(
        "weight-tiny",
        "most of weight encoder.weight is under 6.1e-05, where float16 loses digits",
        "94.6% of its nonzero values",
    )


# --- together ------------------------------------------------------------------------------------

WORST = Measured(
    (("its result", Range(INF)),), (("a", Range(1.0, 0.0)), ("b", Range(NAN, 1.0))), batches=1
)


@pytest.mark.parametrize(
    ("guards", "found"),
    [
        (Guards(), "activation-range"),
        (Guards(activation_headroom=False), "weight-range"),
        (Guards(activation_headroom=False, weight_headroom=False), "weight-tiny"),
        (Guards(weight_headroom=False, weight_tiny_share=False), "activation-range"),
        (Guards(False, False, False), None),
    ],
)
def test_the_first_guard_that_is_on_speaks(guards: Guards, found: str | None) -> None:
    finding = first_finding(WORST, guards, F16)
    assert (finding.guard if finding else None) == found


def test_a_weight_after_a_good_one_is_looked_at_too() -> None:
    finding = weight_range(WORST, Guards(), F16)
    assert finding is not None
    assert "weight b " in finding.reason
