"""The checks on gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.validate.training.gradient_results import GradientDifference
from amp_convert.verdict.gradient_checks import gradients_check
from amp_convert.verdict.thresholds import Thresholds
from tests.evidence import FP16
from tests.training_evidence import (
    difference,
    gradients,
    layer,
    parity,
)

NAN, INF = math.nan, math.inf


def judged(limits: Thresholds = FP16, **changes: Any) -> tuple[str, str]:
    check = gradients_check(parity(gradients=gradients(**changes)), limits)
    return check.status, check.reason


def total(rel_l2: float | None, **changes: Any) -> dict[str, Any]:
    return {"total": GradientDifference(**difference(rel_l2, **changes))}


@pytest.mark.parametrize(
    ("error", "rounded", "status"),
    [
        (0.1, None, "pass"),
        (0.101, None, "fail"),
        (0.101, 0.03, "fail"),
        # No more than three times what rounding the weights alone does to FP32's gradients.
        (0.7, 0.25, "unchecked"),
        (0.7, NAN, "fail"),
        (0.7, INF, "fail"),
        (NAN, 0.25, "fail"),
        (INF, 0.25, "fail"),
        (NAN, INF, "fail"),
        (None, 0.25, "unchecked"),
    ],
)
def test_the_error_of_all_gradients(
    error: float | None, rounded: float | None, status: str
) -> None:
    assert judged(**total(error), rounded_rel_l2=rounded)[0] == status


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"zeroed_share": 0.1}, "pass"),
        ({"zeroed_share": 0.11}, "fail"),
        ({"zeroed_share": NAN}, "fail"),
        ({"rel_l2": 0.5}, "pass"),
        ({"rel_l2": 0.51}, "fail"),
        ({"rel_l2": NAN}, "fail"),
        # However small beside the others: what counts is its own noise.
        ({"zeroed_share": 1.0, "ref_abs_max": 2.0**-60}, "fail"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": 1e-3}, "fail"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": 0.9}, "pass"),
        ({"zeroed_share": 1.0, "rel_l2": 1.0, "noise_rel_l2": INF}, "pass"),
        # FP32's own part by as much once its weights are rounded: nobody can tell.
        ({"rel_l2": 0.6, "rounded_rel_l2": 0.2}, "unchecked"),
        ({"rel_l2": 0.6, "rounded_rel_l2": 0.19}, "fail"),
        ({"rel_l2": NAN, "rounded_rel_l2": 0.2}, "fail"),
        ({"rel_l2": 0.6, "rounded_rel_l2": NAN}, "fail"),
        ({"zeroed_share": 1.0, "rounded_rel_l2": 0.9}, "fail"),
    ],
)
def test_each_layer_is_held_to_its_own_noise(changes: dict[str, Any], status: str) -> None:
    one = replace(layer("encoder.0"), **changes)
    assert judged(layers=(layer(), one, layer("tail")))[0] == status


def test_a_lost_layer_is_named_and_no_rounding_excuses_it() -> None:
    status, reason = judged(
        layers=(layer(), layer("encoder.0", zeroed_share=0.25)), rounded_rel_l2=5.0, **total(1.0)
    )
    assert status == "fail"
    assert reason == (
        "the gradients of one step, at a loss scale of 65536, differ from FP32's by 1 (relative L2 "
        "of all), and 25 % of those of encoder.0 are 0, which FP32's are not"
    )


def test_what_is_wrong_whatever_the_tolerance_fails() -> None:
    assert judged(only_fp32=("head.weight", "head.bias")) == (
        "fail",
        "head.weight has a gradient in the FP32 model only, and 1 more",
    )
    assert judged(loss_mixed=NAN) == ("fail", "the mixed loss is nan, FP32's is 2")
    for difference_of_reference in (2e-6, NAN, INF):
        status, reason = judged(reference_rel_l2=difference_of_reference)
        assert status == "fail"
        assert reason.startswith("the captured FP32 graph has not the eager model's gradients")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        (total(0.5), "unchecked"),
        ({"layers": (layer(zeroed_share=0.5),)}, "unchecked"),
        (total(NAN), "fail"),
        ({"layers": (layer(zeroed_share=NAN),)}, "fail"),
        ({"only_mixed": ("head.weight",)}, "fail"),
    ],
)
def test_dropout_of_other_elements_is_no_error_and_no_excuse(
    changes: dict[str, Any], status: str
) -> None:
    assert judged(same_random_numbers=False, **changes)[0] == status


@pytest.mark.parametrize(
    ("error", "status"), [(0.0, "pass"), (1e-7, "unchecked"), (2e-6, "fail"), (NAN, "fail")]
)
def test_gradients_that_nothing_was_converted_in_are_exact(error: float, status: str) -> None:
    found, reason = judged(FP16.exact(), **total(error), rounded_rel_l2=0.5)
    assert found == status
    assert reason.endswith("add in no fixed order make of FP32") == (status == "unchecked")


def test_rounding_that_excuses_an_error_is_named() -> None:
    assert judged(**total(0.5), rounded_rel_l2=0.2)[1].endswith(
        "differ from FP32's by 0.5 (relative L2 of all); that is no more than 3 times what FP32's "
        "own differ by once its weights are rounded"
    )
