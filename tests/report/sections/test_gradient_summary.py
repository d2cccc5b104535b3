"""What every writer says of the gradients of one step."""

from __future__ import annotations

import math

import pytest

from amp_convert.core.exponent_histogram import ScaleAdvice
from amp_convert.report.sections.gradient_summary import (
    RangeRow,
    WorstGradient,
    advice_text,
    gradient_remarks,
    gradient_text,
    range_note,
    range_rows,
    share,
    underflow_text,
    worst_gradients,
)
from amp_convert.validate.training.gradient_results import GradientDifference
from tests.report.trained import gradients, parameter, range_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.3949, "39.5 %"),
        (0.00061, "0.061 %"),
        (2.6e-5, "0.0026 %"),
        (2e-7, "< 0.001 %"),
        (0.99999, "> 99.9 %"),
    ],
)
def test_a_small_share_keeps_two_digits(value: float | None, text: str) -> None:
    assert share(value) == text


def test_the_headline() -> None:
    assert gradient_text(gradients()) == (
        "relative L2 error 4.00e-03, cosine 0.999, 12.5 % turned to zero, at a loss scale of 65536"
    )
    assert gradient_text(gradients(rounded_rel_l2=0.003)).startswith(
        "relative L2 error 4.00e-03 (FP32's own with its weights rounded once: 3.00e-03), cosine"
    )
    assert gradient_text(gradients(scale=1.0)).endswith("turned to zero, without a loss scale")
    nothing = GradientDifference(0, None, None, None, None, None, 0)
    assert gradient_text(gradients(total=nothing)) == "no parameter has a gradient"


def test_what_fp16_would_lose() -> None:
    # 10 of 100 activation gradients that are not zero lie at 2**-27.
    assert underflow_text(gradients()) == (
        "under 2⁻²⁴: activation gradients 10.0 %, scaled 0 %; weight gradients 0 %, scaled 0 %"
    )
    plain = gradients(scale=1.0, weight_range=range_of({}, zeros=3))
    assert underflow_text(plain) == "under 2⁻²⁴: activation gradients 10.0 %"
    nothing = range_of({}, zeros=3)
    zero = gradients(weight_range=nothing, activation_range=nothing)
    assert underflow_text(zero) == "every gradient is zero"


def test_the_ranges() -> None:
    assert range_rows(gradients()) == [
        RangeRow("activations", "100 of 120", "1.46e-03", "10.0 %", "50.0 %", "0 %", "0 %"),
        RangeRow("weights", "40 of 40", "1.88e-01", "0 %", "0 %", "0 %", "0 %"),
    ]
    assert "FP16 has nothing between 0 and 2⁻²⁴" in range_note(gradients())
    assert "bfloat16 has FP32's range" in range_note(gradients(dtype="bfloat16"))


def test_the_recommended_scale_and_what_it_saves() -> None:
    assert advice_text(gradients()) == (
        "8192, with 0 % of all gradients under 2⁻²⁴, against 6.2 % without a scale "
        "(the largest FP32 gradient is 2)"
    )
    assert advice_text(gradients(), why=False).endswith("against 6.2 % without a scale")
    none = ScaleAdvice(None, "every gradient is zero", None, None)
    assert advice_text(gradients(recommended=none)) == "none, since every gradient is zero"
    low = gradients(dtype="bfloat16")
    assert advice_text(low) == "none, since bfloat16 has FP32's range"


def test_the_worst_parameters_come_first_and_exact_ones_not_at_all() -> None:
    found = gradients(parameters=(*gradients().parameters, parameter("classifier.bias", math.nan)))
    rows = worst_gradients(found)
    assert [row.name for row in rows] == [
        "classifier.bias",
        "classifier.weight",
        "features.0.weight",
    ]
    assert rows[1:] == [
        WorstGradient("classifier.weight", "2 × 5", 0.005, 0.99, "12.5 %", "0 %", "0 %"),
        WorstGradient("features.0.weight", "2 × 5", 0.003, 0.999, "12.5 %", "25.0 %", "0 %"),
    ]
    assert len(worst_gradients(found, limit=2)) == 2


def test_a_layer_without_activation_gradients_has_empty_cells() -> None:
    (row,) = worst_gradients(gradients(parameters=(parameter("other.weight", 0.5),)))
    assert (row.underflow, row.scaled_underflow) == ("", "")


def test_remarks_say_what_is_wrong_and_what_does_not_learn() -> None:
    assert gradient_remarks(gradients()) == []
    found = gradients(
        only_fp32=("a.weight",),
        reference_rel_l2=2e-7,
        without_gradient=("b", "c", "d", "e", "f"),
    )
    assert gradient_remarks(found) == [
        "a.weight has a gradient in the FP32 model only",
        "the captured FP32 graph's gradients differ from the eager model's by 2.00e-07",
        "without a gradient in either model: b, c, d and 2 more",
    ]
