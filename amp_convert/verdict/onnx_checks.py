"""The checks of a verdict on the exported ONNX file: one function a check, pure.

1. `onnx.runs`: does ONNX Runtime run the file, as it stands and as it optimises it? Where the
   provider at hand has no kernel for the dtype, that is unchecked: it says nothing of the file.
2. `onnx.outputs.*`: are the outputs of both near to FP32 PyTorch's? As for the converted model; a
   model that draws random numbers has none that could be compared.
3. `onnx.converted`: are they those of the converted PyTorch model, as near as two FP32 runtimes
   are to each other? Where they are not and a node is known at which they part, that is how ONNX
   Runtime computes it: unchecked, and named. Without such a node the file itself is in doubt; and
   where it is only the optimised run that is far off, ONNX Runtime's optimiser is.
4. `onnx.metrics.NAME`: do the user's metrics hold?
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from amp_convert.validate.inference.results import MetricPair
from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.metric_checks import metric_check
from amp_convert.verdict.output_checks import checks_of_outputs
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.validate.inference.results import OutputError
    from amp_convert.validate.onnx.results import OnnxOutput, OnnxParity

SPOILT = 10.0
"""How many times the unoptimised file's distance from PyTorch, or the limit of it, is more than
another order of roundings."""
_JUDGED = ("unoptimised", "optimised")


def onnx_checks(
    parity: OnnxParity | None,
    reason: str,
    limits: Thresholds,
    *,
    required: bool = False,
    metrics_supplied: bool = True,
) -> tuple[Check, ...]:
    """All checks on the file; one unchecked one with `reason` where there is none, which is
    `required` where a file was asked for."""
    if parity is None:
        return (Check("onnx", CheckStatus.UNCHECKED, None, None, reason, required=required),)
    missing = "" if parity.batches > 0 else "no batch went through ONNX Runtime"
    if parity.drawing:
        missing = _random(parity)
    return (
        runs_check(parity),
        *checks_of_outputs("onnx.outputs", _outputs(parity), missing, limits),
        converted_check(parity),
        *metric_checks(parity, limits, supplied=metrics_supplied),
    )


def runs_check(parity: OnnxParity) -> Check:
    name = "onnx.runs"
    runs = {run.arm: run for run in parity.runs if run.arm in _JUDGED}
    if len(runs) < len(_JUDGED) or parity.batches <= 0:
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, "the file was not run")
    where = f"{parity.runtime} on {', '.join(parity.providers)}"
    failed = [run for run in runs.values() if run.failure]
    if failed:
        run = failed[0]
        but = f"; it does without {', '.join(run.without)}" if run.without else ""
        reason = f"{where} cannot run the file {run.arm}: {run.failure}{but}"
        lacking = all(run.lacks_kernel for run in failed)
        return Check(
            name,
            CheckStatus.UNCHECKED if lacking else CheckStatus.FAIL,
            float(len(failed)),
            0.0,
            reason,
        )
    short = [run for run in runs.values() if run.batches < parity.batches]
    if short:
        reason = f"the file ran on {short[0].batches} of {parity.batches} batches"
        return Check(
            name, CheckStatus.UNCHECKED, float(len(short)), 0.0, f"{short[0].arm}, {reason}"
        )
    if stepwise := _unrun_by_node(parity):
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, stepwise)
    reason = f"{where} runs the file as it stands and optimised, on all {parity.batches} batches"
    return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)


@optional
def converted_check(parity: OnnxParity) -> Check:
    name = "onnx.converted"
    if parity.drawing:
        return Check(name, CheckStatus.UNCHECKED, None, None, _random(parity))
    failed = [run for run in parity.runs if run.failure and not run.without]
    runs = [run for run in parity.runs if run.arm != "fp32" and run not in failed]
    apart = [run for run in runs if run.agrees is False]
    if spoilt := _spoilt(parity):
        plain, output = spoilt
        how = (
            f"optimised, {_distance(output, parity.dtype)}; unoptimised {_size(plain)}: an "
            "optimisation of ONNX Runtime changes the result. Open the file with fewer of them"
        )
        return Check(name, CheckStatus.FAIL, _max_abs(output), output.limit, how)
    if apart:
        run = apart[0]
        output = next(each for each in run.outputs if each.agrees is False)
        reason, distance = f"{run.arm}, {_distance(output, parity.dtype)}", _max_abs(output)
        by_hand = run.arm == "node by node"
        node = parity.parting or parity.drifting or ("" if by_hand else parity.unrounded)
        if node:
            what = "part" if parity.parting else "drift apart"
            how = f"ONNX Runtime and PyTorch {what} at {node}"
            if not parity.parting and not parity.drifting:
                how = f"ONNX Runtime computes {node} in float32, and need not round as PyTorch does"
            return Check(name, CheckStatus.UNCHECKED, distance, output.limit, f"{reason}: {how}")
        how = "no node is known that parts"
        return Check(name, CheckStatus.FAIL, distance, output.limit, f"{reason}, and {how}")
    if stepwise := _unrun_by_node(parity):
        return Check(name, CheckStatus.UNCHECKED, None, None, stepwise)
    unknown = [run for run in runs if run.agrees is None]
    if unknown or not runs:
        which = unknown[0].arm if unknown else "no run"
        why = "there is nothing to hold it against, or the FP32 file itself is far from PyTorch"
        return Check(name, CheckStatus.UNCHECKED, None, None, f"{which}: {why}")
    reason = "the file agrees with the converted PyTorch model as two FP32 runtimes do"
    return Check(name, CheckStatus.PASS, None, None, reason)


def _random(parity: OnnxParity) -> str:
    return f"the model draws random numbers at {parity.drawing}, and ONNX Runtime draws others"


def _unrun_by_node(parity: OnnxParity) -> str:
    """Why the roundings of the file are not known: on a CPU, only node by node do they happen."""
    for run in parity.runs:
        if run.arm == "node by node" and run.failure:
            return f"the file does not run node by node: {run.failure}"
    return ""


def _spoilt(parity: OnnxParity) -> tuple[OnnxOutput, OnnxOutput] | None:
    """An output, unoptimised and optimised, that optimising takes far off: from the converted
    model, and from FP32 too, since leaving out a rounding only brings it nearer to that."""
    arms = {run.arm: run.outputs for run in parity.runs}
    pairs = zip(arms.get("unoptimised", ()), arms.get("optimised", ()), strict=False)
    for plain, output in pairs:
        before, after = plain.against_converted, output.against_converted
        if before is None or after is None or output.agrees is not False:
            continue
        if output.limit is None:
            if not before.mismatches and after.mismatches:
                return plain, output
            continue
        floor = output.limit
        if _leaps(before.max_abs_err, after.max_abs_err, floor) and _leaps(
            plain.against_fp32.max_abs_err, output.against_fp32.max_abs_err, floor
        ):
            return plain, output
    return None


def _leaps(before: float, after: float, floor: float) -> bool:
    """Whether an error grows by more than another order of roundings explains; NaN is large."""
    return not math.isnan(before) and not after <= SPOILT * max(before, floor)


def _size(output: OnnxOutput) -> str:
    error = output.against_converted
    assert error is not None
    return f"{error.max_abs_err:.2e}" if output.limit is not None else f"{error.mismatches}"


def _max_abs(output: OnnxOutput) -> float | None:
    """The largest distance from the converted PyTorch model, of an output that has a limit."""
    error = output.against_converted
    return None if error is None or output.limit is None else error.max_abs_err


def _distance(output: OnnxOutput, dtype: str) -> str:
    """How far an output that does not agree is from the converted PyTorch model's."""
    error = output.against_converted
    assert error is not None
    if output.limit is None:
        return f"output {error.name} has {error.mismatches} elements other than PyTorch's"
    return (
        f"output {error.name} is {error.max_abs_err:.2e} from the converted PyTorch model at most, "
        f"more than {output.limit:.2e}, 4 times what the FP32 file is from FP32 PyTorch and one "
        f"ULP of {dtype}"
    )


def metric_checks(parity: OnnxParity, limits: Thresholds, *, supplied: bool) -> list[Check]:
    if parity.drawing or not parity.metrics:
        why = _random(parity) if parity.drawing else "no metric was computed"
        unchecked = CheckStatus.UNCHECKED
        return [Check("onnx.metrics", unchecked, None, None, why, required=supplied)]
    return [
        metric_check(
            f"onnx.metrics.{m.name}",
            MetricPair(m.name, m.fp32, m.onnx, None, m.lower_is_better),
            limits.metric_tolerance,
            "in ONNX Runtime",
            required=supplied,
        )
        for m in parity.metrics
    ]


def _outputs(parity: OnnxParity) -> list[OutputError]:
    """The outputs of both runs, each named with its run."""
    return [
        replace(output.against_fp32, name=f"{output.against_fp32.name} ({run.arm})")
        for run in parity.runs
        if run.arm in _JUDGED
        for output in run.outputs
    ]
