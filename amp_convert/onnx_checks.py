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

from amp_convert.checks import Check, metric_check
from amp_convert.divergence import MetricPair
from amp_convert.output_checks import checks_of_outputs
from amp_convert.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.divergence import OutputError
    from amp_convert.onnx_parity import OnnxOutput, OnnxParity

_NO_KERNEL = "NOT_IMPLEMENTED"
"""What ONNX Runtime's message holds where a kernel is missing."""
SPOILT = 10.0
"""How many times the unoptimised file's distance from PyTorch, or the limit of it, is more than
another order of roundings."""
_JUDGED = ("unoptimised", "optimised")


def onnx_checks(parity: OnnxParity | None, reason: str, limits: Thresholds) -> tuple[Check, ...]:
    """All checks on the file; one unchecked one with `reason` where there is none."""
    if parity is None:
        return (Check("onnx", "unchecked", None, None, reason),)
    missing = "" if parity.batches > 0 else "no batch went through ONNX Runtime"
    if parity.drawing:
        missing = (
            f"the model draws random numbers at {parity.drawing}, and ONNX Runtime draws others"
        )
    return (
        runs_check(parity),
        *checks_of_outputs("onnx.outputs", _outputs(parity), missing, limits),
        converted_check(parity),
        *metric_checks(parity, limits),
    )


def runs_check(parity: OnnxParity) -> Check:
    name = "onnx.runs"
    runs = {run.arm: run for run in parity.runs if run.arm in _JUDGED}
    if len(runs) < len(_JUDGED) or parity.batches <= 0:
        return Check(name, "unchecked", None, 0.0, "the file was not run")
    where = f"{parity.runtime} on {', '.join(parity.providers)}"
    failed = [run for run in runs.values() if run.failure]
    if failed:
        reason = f"{where} cannot run the file {failed[0].arm}: {failed[0].failure}"
        lacking = all(_NO_KERNEL in run.failure for run in failed)
        return Check(name, "unchecked" if lacking else "fail", float(len(failed)), 0.0, reason)
    short = [run for run in runs.values() if run.batches < parity.batches]
    if short:
        reason = f"the file ran on {short[0].batches} of {parity.batches} batches"
        return Check(name, "unchecked", float(len(short)), 0.0, f"{short[0].arm}, {reason}")
    without = runs["optimised"].without
    less = f"; optimised, it takes all but {', '.join(without)}" if without else ""
    reason = f"{where} runs the file as it stands and optimised, on all {parity.batches} batches"
    return Check(name, "pass", 0.0, 0.0, reason + less)


def converted_check(parity: OnnxParity) -> Check:
    name = "onnx.converted"
    runs = [run for run in parity.runs if run.arm != "fp32" and not run.failure]
    apart = [run for run in runs if run.agrees is False]
    spoilt = _spoilt(parity)
    if apart:
        run = parity.run("optimised") if spoilt else apart[0]
        output = next(each for each in run.outputs if each.agrees is False)
        reason, distance = f"{run.arm}, {_distance(output, parity.dtype)}", _max_abs(output)
        by_hand = run.arm == "node by node"
        node = parity.parting or parity.drifting or ("" if by_hand else parity.unrounded)
        if node and not spoilt:
            what = "part" if parity.parting else "drift apart"
            how = f"ONNX Runtime and PyTorch {what} at {node}"
            if not parity.parting and not parity.drifting:
                how = f"ONNX Runtime computes {node} in float32, and need not round as PyTorch does"
            return Check(name, "unchecked", distance, output.limit, f"{reason}: {how}")
        how = spoilt or "no node is known that parts"
        return Check(name, "fail", distance, output.limit, f"{reason}, and {how}")
    unknown = [run for run in runs if run.agrees is None]
    if unknown or not runs:
        which = unknown[0].arm if unknown else "no run"
        return Check(name, "unchecked", None, None, f"{which}: there is nothing to hold it against")
    reason = "the file agrees with the converted PyTorch model as two FP32 runtimes do"
    return Check(name, "pass", None, None, reason)


def _spoilt(parity: OnnxParity) -> str:
    """What to say where only the optimised file is far off, by more than rounding; "" otherwise."""
    arms = {run.arm: run.outputs for run in parity.runs}
    for plain, output in zip(arms.get("unoptimised", ()), arms.get("optimised", ()), strict=False):
        before, after = _max_abs(plain), _max_abs(output)
        if before is None or after is None or math.isnan(before) or output.agrees is not False:
            continue
        if not after <= SPOILT * max(before, output.limit or 0.0):  # NaN is far off, too
            return (
                f"unoptimised only {before:.2e}: an optimisation of ONNX Runtime changes the "
                "result. Open the file with fewer of them"
            )
    return ""


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


def metric_checks(parity: OnnxParity, limits: Thresholds) -> list[Check]:
    if not parity.metrics:
        return [Check("onnx.metrics", "unchecked", None, None, "no metric was computed")]
    return [
        metric_check(
            f"onnx.metrics.{m.name}",
            MetricPair(m.name, m.fp32, m.onnx, None, m.lower_is_better),
            limits.metric_tolerance,
            "in ONNX Runtime",
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
