"""The checks on the outputs, from both sides of each limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.verdict.verdict import Thresholds
from tests.evidence import check, divergence, label, output, plan, verdict, with_output

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"rel_l2": 2e-2}, "outputs.rel_l2", "pass"),
        ({"rel_l2": 2.01e-2}, "outputs.rel_l2", "fail"),
        ({"rel_l2": NAN}, "outputs.rel_l2", "fail"),
        ({"rel_l2": INF}, "outputs.rel_l2", "fail"),
        ({"rel_l2": -1.0}, "outputs.rel_l2", "fail"),
        ({"cosine": 0.9991}, "outputs.cosine", "pass"),
        ({"cosine": 1 + 1e-9}, "outputs.cosine", "pass"),
        ({"cosine": 0.9989}, "outputs.cosine", "fail"),
        ({"cosine": -1.0}, "outputs.cosine", "fail"),
        ({"cosine": NAN}, "outputs.cosine", "fail"),
        ({"cosine": INF}, "outputs.cosine", "fail"),
        # The limit is 5 times 2e-2 of the largest distance from the mean, 8.
        ({"max_abs_err": 0.79}, "outputs.max_abs", "pass"),
        ({"max_abs_err": 0.81}, "outputs.max_abs", "fail"),
        ({"max_abs_err": NAN}, "outputs.max_abs", "fail"),
        ({"ref_abs_max": NAN}, "outputs.max_abs", "fail"),
        ({"ref_abs_max": INF}, "outputs.max_abs", "fail"),
        ({"nonfinite": 1}, "outputs.finite", "fail"),
    ],
)
def test_output_limits_for_float16(changes: dict[str, Any], name: str, status: str) -> None:
    found = verdict(with_output(**changes))
    assert check(name, found).status == status
    if status == "fail":
        assert found.status == "fail"


def test_limits_for_bfloat16_are_its_own() -> None:
    limits = Thresholds.for_dtype("bfloat16")
    planned = plan(dtype="bfloat16")
    near = divergence(outputs=(output(rel_l2=0.15, cosine=0.9901, max_abs_err=3.9),))
    found = verdict(near, planned=planned, thresholds=limits)
    for name in ("outputs.rel_l2", "outputs.cosine", "outputs.max_abs"):
        assert check(name, found).status == "pass"
    beyond = divergence(outputs=(output(rel_l2=0.17, cosine=0.989, max_abs_err=4.1),))
    found = verdict(beyond, planned=planned, thresholds=limits)
    for name in ("outputs.rel_l2", "outputs.cosine", "outputs.max_abs"):
        assert check(name, found).status == "fail"


def test_the_largest_error_is_judged_where_the_cosine_hides_it() -> None:
    # One element of a million is off by half the largest value; everything else is exact.
    found = verdict(with_output(elements=10**6, rel_l2=1e-3, cosine=0.9999995, max_abs_err=4.0))
    assert [one.name for one in found.checks if one.status == "fail"] == ["outputs.max_abs"]


def test_an_output_that_is_not_finite_in_fp32_already_is_not_vouched_for() -> None:
    rows = (output("a"), output("b", ref_nonfinite=5))
    found = verdict(divergence(outputs=rows))
    one = check("outputs.finite", found)
    assert (found.status, one.status) == ("inconclusive", "unchecked")
    assert one.reason == "output b: 5 of 640 elements are NaN or infinite in FP32 already"
    worse = divergence(outputs=(output("a", nonfinite=1), rows[1]))
    assert check("outputs.finite", verdict(worse)).status == "fail"


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rel_l2": 0.5}, "outputs.rel_l2"),
        ({"rel_l2": NAN}, "outputs.rel_l2"),
        ({"cosine": NAN}, "outputs.cosine"),
        ({"max_abs_err": NAN}, "outputs.max_abs"),
        ({"nonfinite": 3}, "outputs.finite"),
    ],
)
def test_the_worst_output_decides_wherever_it_stands(
    place: int, changes: dict[str, Any], name: str
) -> None:
    rows = [output("a"), output("b"), output("c")]
    rows[place] = replace(rows[place], **changes)
    one = check(name, verdict(divergence(outputs=tuple(rows))))
    assert one.status == "fail"
    assert one.reason.startswith(f"output {'abc'[place]}:")


def test_the_smallest_tolerance_that_would_pass_is_the_worst_error() -> None:
    worst = 0.0123456
    rows = (output("a"), output("b", rel_l2=worst))
    one = check("outputs.rel_l2", verdict(divergence(outputs=rows)))
    assert one.value == worst
    assert "the smallest tolerance that would pass is 0.0123" in one.reason
    exactly = Thresholds.for_dtype("float16", output_rel_l2=worst)
    found = verdict(divergence(outputs=rows), thresholds=exactly)
    assert check("outputs.rel_l2", found).status == "pass"
    below = Thresholds.for_dtype("float16", output_rel_l2=math.nextafter(worst, 0))
    assert check("outputs.rel_l2", verdict(divergence(outputs=rows), thresholds=below)).status == (
        "fail"
    )


def test_no_tolerance_is_promised_for_a_broken_output() -> None:
    one = check("outputs.rel_l2", verdict(with_output(rel_l2=INF)))
    assert one.reason.endswith("no tolerance would pass")


@pytest.mark.parametrize(("mismatches", "status"), [(0, "pass"), (6, "pass"), (7, "fail")])
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integer_and_boolean_outputs_agree_in_99_percent(
    mismatches: int, status: str, dtype: str
) -> None:
    rows = (output(), label(mismatches, dtype=dtype, rel_l2=NAN, cosine=NAN, max_abs_err=NAN))
    found = verdict(divergence(outputs=rows, autocast_outputs=rows))
    assert check("outputs.agreement", found).status == status
    assert check("outputs.rel_l2", found).status == "pass"


def test_without_integer_outputs_there_is_no_agreement_to_check() -> None:
    found = verdict(divergence(outputs=(output(),), autocast_outputs=(output(),)))
    assert "outputs.agreement" not in [one.name for one in found.checks]
    assert found.status == "pass"


@pytest.mark.parametrize(("mismatches", "status"), [(6, "pass"), (7, "fail")])
def test_a_model_of_integers_is_judged_by_agreement_alone(mismatches: int, status: str) -> None:
    rows = (label(mismatches),)
    found = verdict(divergence(outputs=rows, autocast_outputs=rows))
    assert found.status == status
    assert [one.name for one in found.checks if one.name.startswith("outputs.")] == [
        "outputs.structure",
        "outputs.finite",
        "outputs.agreement",
        "outputs.vs_autocast",
        "outputs.untuned",
    ]
    native = check("outputs.vs_autocast", found)
    assert native.status == "unchecked"
    assert native.reason == "the model returns no floating point output"


@pytest.mark.parametrize(
    ("name", "called"), [("", "the output"), ("output", "the output"), ("h[0]", "output h[0]")]
)
def test_a_model_with_one_output_has_no_name_for_it(name: str, called: str) -> None:
    found = verdict(divergence(outputs=(output(name),), autocast_outputs=(output(name),)))
    for one in ("rel_l2", "cosine", "max_abs", "vs_autocast"):
        assert check(f"outputs.{one}", found).reason.startswith(f"{called}: ")


@pytest.mark.parametrize("rows", [(), (output(elements=0),)])
def test_no_elements_are_nothing_to_judge(rows: tuple[Any, ...]) -> None:
    found = verdict(divergence(outputs=rows))
    assert found.status == "inconclusive"
    for name in ("finite", "rel_l2", "cosine", "max_abs", "vs_autocast"):
        assert check(f"outputs.{name}", found).status == "unchecked"


def test_an_empty_output_does_not_hide_the_others() -> None:
    empty = output("empty", elements=0, rel_l2=NAN, cosine=NAN, max_abs_err=NAN, ref_abs_max=NAN)
    assert verdict(divergence(outputs=(empty, output()))).status == "pass"
    assert verdict(divergence(outputs=(empty, output(rel_l2=0.5)))).status == "fail"


def test_an_output_of_zeros_is_judged_without_its_cosine() -> None:
    zeros = output("mask", rel_l2=0.0, cosine=NAN, max_abs_err=0.0, ref_abs_max=0.0)
    zeros = replace(zeros, noise_rel_l2=0.0, noise_max_abs=0.0)
    assert verdict(divergence(outputs=(output(), zeros))).status == "pass"
    off = replace(zeros, rel_l2=INF, max_abs_err=1e-9)
    found = verdict(divergence(outputs=(output(), off)))
    assert check("outputs.rel_l2", found).status == "fail"
    assert check("outputs.max_abs", found).status == "fail"
    alone = verdict(divergence(outputs=(zeros,), autocast_outputs=(zeros,)))
    assert check("outputs.cosine", alone).status == "unchecked"
    assert alone.status == "inconclusive"


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        (3e-3, 1e-3, "pass"),
        (3.01e-3, 1e-3, "fail"),
        (1e-3, 1e-2, "pass"),
        # One rounding of float16 is 4.9e-4: below it, both count as one rounding.
        (4e-4, 1e-9, "pass"),
        (4e-4, 0.0, "pass"),
        (1.4e-3, 0.0, "pass"),
        (1.5e-3, 0.0, "fail"),
        (NAN, 1e-3, "fail"),
        (INF, 1e-3, "fail"),
        (1e-3, NAN, "unchecked"),
        (1e-3, INF, "unchecked"),
    ],
)
def test_error_against_native_autocast(ours: float, theirs: float, status: str) -> None:
    found = verdict(
        divergence(outputs=(output(rel_l2=ours),), autocast_outputs=(output(rel_l2=theirs),))
    )
    assert check("outputs.vs_autocast", found).status == status


def test_autocast_that_could_not_run_is_visible_and_does_not_block() -> None:
    found = verdict(divergence(autocast_outputs=(), autocast_reason="bans binary_cross_entropy"))
    one = check("outputs.vs_autocast", found)
    assert (found.status, one.status) == ("pass", "unchecked")
    assert one.reason == "native autocast did not run: bans binary_cross_entropy"


def test_an_output_that_autocast_lacks_is_unchecked_but_a_failure_elsewhere_stands() -> None:
    rows = (output("a"), output("b"))
    lacking = divergence(outputs=rows, autocast_outputs=(output("a"),))
    one = check("outputs.vs_autocast", verdict(lacking))
    assert one.status == "unchecked"
    assert one.reason == "native autocast gave no finite error for output b"
    worse = divergence(outputs=(output("a", rel_l2=0.01), rows[1]), autocast_outputs=(output("a"),))
    one = check("outputs.vs_autocast", verdict(worse))
    assert (one.status, one.value) == ("fail", pytest.approx(10.0))
    assert one.reason.startswith("output a:")


# --- the graph that runs with gradients on -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        ({"rel_l2": 0.5}, "fail"),
        ({"rel_l2": math.nan}, "fail"),
        ({"nonfinite": 1}, "fail"),
        ({"max_abs_err": 7.0}, "fail"),
    ],
)
def test_the_graph_with_gradients_on_is_held_to_the_same_limits(
    changes: dict[str, Any], status: str
) -> None:
    found = verdict(divergence(untuned_outputs=(output(**changes), label())))
    held = check("outputs.untuned", found)
    assert (found.status, held.status, held.required) == (status, status, True)


def test_a_model_in_parts_is_not_run_with_gradients_on_and_may_pass() -> None:
    found = verdict(divergence(untuned_outputs=()))
    parts = check("outputs.untuned", found)
    assert (found.status, parts.status, parts.required) == ("pass", "unchecked", False)
