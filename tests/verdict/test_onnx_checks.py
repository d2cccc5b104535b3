"""The checks on an ONNX file: nothing passes that was not run, and every refusal has its reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.validate.inference.results import OutputError
from amp_convert.validate.onnx.results import OnnxMetric, OnnxOutput, OnnxParity, OnnxRun
from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.onnx_checks import converted_check, onnx_checks, runs_check
from amp_convert.verdict.thresholds import Thresholds

LIMITS = Thresholds.for_dtype("float16")


def output(rel_l2: float = 1e-3, **changes: Any) -> OutputError:
    base = OutputError(
        name="logits",
        dtype="float32",
        elements=100,
        rel_l2=rel_l2,
        cosine=0.99999,
        max_abs_err=1e-3,
        ref_abs_max=1.0,
        abs_err_p50=1e-4,
        abs_err_p90=1e-4,
        abs_err_p95=1e-4,
        abs_err_p99=1e-4,
        mismatches=0,
        nonfinite=0,
        ref_nonfinite=0,
    )
    return replace(base, **changes)


def ran(arm: Any, agrees: bool | None = True, **changes: Any) -> OnnxRun:
    error = changes.pop("error", output())
    held = OnnxOutput(error, output(1e-4), 1e-2 if agrees is not False else 1e-4, agrees)
    base = OnnxRun(arm=arm, failure="", without=(), batches=3, outputs=(held,))
    return replace(base, **changes)


def parity(*runs: OnnxRun, **changes: Any) -> OnnxParity:
    base = OnnxParity(
        path="model.onnx",
        dtype="float16",
        runtime="onnxruntime 1.32.0",
        providers=("CPUExecutionProvider",),
        batches=3,
        samples=12,
        runs=runs or (ran("fp32"), *BOTH, ran("node by node")),
        ran={"in float32": 4},
        ran_reason="",
        nodes=(),
        node_batches=1,
        unmatched=(),
        parting="",
        drifting="",
        metrics=(OnnxMetric("accuracy", 0.9, 0.9, 0.9, lower_is_better=False),),
        metrics_arm="optimised",
    )
    return replace(base, **changes)


BOTH = (ran("unoptimised"), ran("optimised"))


def statuses(found: OnnxParity | None) -> dict[str, str]:
    return {
        check.name: check.status
        for check in onnx_checks(found, "not asked for", LIMITS, metrics_supplied=True)
    }


def test_all_is_well() -> None:
    checks = onnx_checks(parity(), "", LIMITS, metrics_supplied=True)
    assert {check.name: check.status for check in checks} == {
        "onnx.runs": "pass",
        "onnx.outputs.structure": "pass",
        "onnx.outputs.finite": "pass",
        "onnx.outputs.rel_l2": "pass",
        "onnx.outputs.cosine": "pass",
        "onnx.outputs.max_abs": "pass",
        "onnx.outputs.channels": "unchecked",
        "onnx.outputs.samples": "unchecked",
        "onnx.converted": "pass",
        "onnx.metrics.accuracy": "pass",
    }
    assert checks[0].reason == (
        "onnxruntime 1.32.0 on CPUExecutionProvider runs the file as it stands and optimised, on "
        "all 3 batches"
    )


def test_without_a_file_there_is_one_open_check() -> None:
    assert onnx_checks(None, "--onnx was not given", LIMITS, metrics_supplied=True) == (
        Check("onnx", CheckStatus.UNCHECKED, None, None, "--onnx was not given", required=False),
    )


@pytest.mark.parametrize("arm", ["unoptimised", "optimised"])
def test_each_of_both_runs_is_judged(arm: str) -> None:
    """An error in one of them is seen, whichever it is."""
    bad = tuple(ran(r.arm, error=output(0.03)) if r.arm == arm else r for r in BOTH)
    found = statuses(parity(*bad))
    assert found["onnx.outputs.rel_l2"] == "fail"
    nan = tuple(ran(r.arm, error=output(math.nan)) if r.arm == arm else r for r in BOTH)
    assert statuses(parity(*nan))["onnx.outputs.rel_l2"] == "fail"
    spilt = tuple(ran(r.arm, error=output(nonfinite=2)) if r.arm == arm else r for r in BOTH)
    assert statuses(parity(*spilt))["onnx.outputs.finite"] == "fail"
    reasons = {
        c.name: c.reason for c in onnx_checks(parity(*bad), "", LIMITS, metrics_supplied=True)
    }
    assert f"output logits ({arm}): relative L2" in reasons["onnx.outputs.rel_l2"]


def test_a_run_that_fails() -> None:
    bad = ran("optimised", None, failure="no kernel for Gelu", outputs=(), batches=0)
    check = runs_check(parity(BOTH[0], bad))
    assert (check.status, check.value) == ("fail", 1.0)
    assert check.reason.endswith("cannot run the file optimised: no kernel for Gelu")
    lacking = replace(
        bad, failure="[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Gemm(13)", lacks_kernel=True
    )
    assert runs_check(parity(BOTH[0], lacking)).status == "unchecked"
    assert runs_check(parity(replace(bad, arm="unoptimised"), lacking)).status == "fail"


def test_a_run_that_is_missing_or_short_is_open() -> None:
    assert runs_check(parity(BOTH[0])).status == "unchecked"
    assert runs_check(parity(BOTH[0], ran("optimised", batches=2))).status == "unchecked"
    none = parity(batches=0)
    assert {statuses(none)[name] for name in ("onnx.runs", "onnx.outputs.rel_l2")} == {"unchecked"}
    assert all(c.required for c in onnx_checks(none, "", LIMITS, metrics_supplied=True)[:2])


@pytest.mark.parametrize(
    ("changes", "arm", "status", "said"),
    [
        ({}, "node by node", "fail", "and no node is known that parts"),
        ({}, "optimised", "fail", "and no node is known that parts"),
        ({"parting": "0/aten.gelu#0"}, "node by node", "unchecked", "part at 0/aten.gelu#0"),
        ({"drifting": "1/aten.add#0"}, "optimised", "unchecked", "drift apart at 1/aten.add#0"),
    ],
)
def test_a_file_that_computes_otherwise(
    changes: dict[str, str], arm: str, status: str, said: str
) -> None:
    arms = (ran("fp32"), *BOTH, ran("node by node"))
    runs = tuple(ran(r.arm, False) if r.arm == arm else r for r in arms)
    check = converted_check(parity(*runs, **changes))
    assert check.status == status
    assert said in check.reason
    assert (check.value, check.threshold) == (1e-3, 1e-4)
    assert check.reason.startswith(
        f"{arm}, output logits is 1.00e-03 from the converted PyTorch model at most, more than "
        "1.00e-04, 4 times what the FP32 file is from FP32 PyTorch and one ULP of float16"
    )


def test_integers_that_differ() -> None:
    held = OnnxOutput(output(), output(dtype="int64", name="ids", mismatches=3), None, False)
    check = converted_check(parity(ran("fp32"), BOTH[0], ran("optimised", outputs=(held,))))
    assert (check.status, check.value, check.threshold) == ("fail", None, None)
    assert check.reason.startswith("optimised, output ids has 3 elements other than PyTorch's")


def held(arm: Any, distance: float, fp32: float | None = None) -> OnnxRun:
    """A run that is this far from the converted model, where 1e-4 is allowed, and from FP32."""
    near = output(max_abs_err=distance if fp32 is None else fp32)
    held = OnnxOutput(near, output(max_abs_err=distance), 1e-4, distance <= 1e-4)
    return ran(arm, outputs=(ran(arm).outputs[0], held))


@pytest.mark.parametrize(
    ("plain", "optimised", "spoilt"),
    [(2e-4, 0.6, True), (5e-5, 0.6, True), (2e-4, 1.9e-3, False), (math.nan, 0.6, False),
     (2e-4, math.nan, True), (0.5, 0.6, False)],
)  # fmt: skip
def test_an_optimisation_that_changes_the_result(
    plain: float, optimised: float, spoilt: bool
) -> None:
    """Whatever node else could explain it: rounding does not."""
    runs = (ran("fp32"), held("unoptimised", plain), held("optimised", optimised))
    check = converted_check(parity(*runs, parting="0/aten.gelu#0"))
    assert check.status == ("fail" if spoilt else "unchecked")
    assert ("an optimisation of ONNX Runtime changes the result" in check.reason) is spoilt
    if spoilt:
        assert check.reason.startswith(f"optimised, output logits is {optimised:.2e} from")
        assert f"unoptimised {plain:.2e}: " in check.reason
        assert math.isnan(optimised) or check.value == optimised


def test_an_optimisation_that_leaves_out_a_rounding_is_no_fault() -> None:
    """It takes the outputs away from PyTorch's, but nearer to FP32's."""
    runs = (ran("fp32"), held("unoptimised", 0.0, fp32=0.07), held("optimised", 0.9, fp32=0.0))
    check = converted_check(parity(*runs, parting="0/aten.sub#0"))
    assert (check.status, check.value) == ("unchecked", 0.9)


def test_an_optimisation_that_changes_integers() -> None:
    ids = output(dtype="int64", name="ids")
    runs = [
        ran(arm, outputs=(OnnxOutput(ids, replace(ids, mismatches=wrong), None, not wrong),))
        for arm, wrong in (("unoptimised", 0), ("optimised", 3))
    ]
    check = converted_check(parity(ran("fp32"), *runs, parting="0/aten.gelu#0"))
    assert check.status == "fail"
    assert "output ids has 3 elements other than PyTorch's; unoptimised 0: an opt" in check.reason


def test_without_the_run_node_by_node_nothing_passes() -> None:
    """On a CPU no other run has the file's roundings."""
    crashed = ran("node by node", None, failure="boom", outputs=(), batches=0)
    found = parity(ran("fp32"), *BOTH, crashed)
    assert (statuses(found)["onnx.runs"], statuses(found)["onnx.converted"]) == ("unchecked",) * 2
    assert runs_check(found).reason == "the file does not run node by node: boom"


def test_what_runs_only_without_an_optimisation_is_judged() -> None:
    far = ran("optimised", False, failure="crashed", without=("Fusion",))
    found = parity(ran("fp32"), BOTH[0], far, ran("node by node"))
    assert converted_check(found).status == "fail"
    # By default a session takes no optimisation away, so its users' sessions crash.
    check = runs_check(found)
    assert check.status == "fail"
    assert check.reason.endswith("cannot run the file optimised: crashed; it does without Fusion")


@pytest.mark.parametrize("agrees", [True, False])
def test_what_draws_random_numbers_is_not_compared(agrees: bool) -> None:
    """Neither what is far off by bad luck, nor what is near by good."""
    runs = (ran("fp32"), *(ran(r.arm, agrees, error=output(1.2)) for r in BOTH))
    found = statuses(parity(*runs, drawing="drop/aten.rand_like#0"))
    assert found.pop("onnx.runs") == "pass"
    assert "onnx.metrics" in found
    assert set(found.values()) == {"unchecked"}


def test_agreement_that_is_not_known_does_not_pass() -> None:
    assert converted_check(parity(ran("unoptimised", None), BOTH[1])).status == "unchecked"
    assert converted_check(parity(ran("fp32"))).status == "unchecked"
    assert not converted_check(parity(ran("fp32"))).required


def test_metrics() -> None:
    worse = OnnxMetric("accuracy", 0.9, 0.9, 0.88, lower_is_better=False)
    assert statuses(parity(metrics=(worse,)))["onnx.metrics.accuracy"] == "fail"
    nan = replace(worse, onnx=math.nan)
    assert statuses(parity(metrics=(nan,)))["onnx.metrics.accuracy"] == "fail"
    assert statuses(parity(metrics=()))["onnx.metrics"] == "unchecked"
    for supplied in (True, False):
        found = onnx_checks(parity(metrics=()), "", LIMITS, metrics_supplied=supplied)
        assert found[-1].required is supplied
