"""The checks of a verdict on the model under `torch.compile`; none where it was not asked for.

1. `compiled.outputs`: are outputs and metrics of the compiled frozen model within the usual limits?
2. `compiled.precision`: is every operator that the plan is about compiled in the dtype that it was
   traced in? See `validate.compiled.watch`.
3. `compiled.gradients`: are the gradients of a compiled training step within the limit of
   `training.gradients`? Required where training was compared.
4. `compiled.performance`: is it no slower than autocast, both compiled? Never required.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from amp_convert.validate.compiled.watch import lowered, raised
from amp_convert.verdict.arm_checks import as_one, checks_of_arm
from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.validate.compiled.results import CompiledParity, OperatorCount


def compiled_checks(
    parity: CompiledParity | None,
    limits: Thresholds,
    *,
    slow_kernels: str = "",
) -> list[Check]:
    """All of them; `slow_kernels` says why no speed can be expected of the device."""
    if parity is None:
        return []
    if parity.failure or not parity.batches:
        reason = parity.failure or "no batch was compared"
        return [Check("compiled.outputs", CheckStatus.UNCHECKED, None, None, reason)]
    found = checks_of_arm("compiled", parity.outputs, parity.metrics, limits)
    return [
        as_one("compiled.outputs", "compiled", found),
        _precision_check(parity),
        _gradients_check(parity, limits),
        _performance_check(parity, slow_kernels),
    ]


def _precision_check(parity: CompiledParity) -> Check:
    name = "compiled.precision"
    steps = parity.step.ops if parity.step is not None else ()
    kinds = (("inference", parity.ops), ("a training step", steps))
    wrong = [(where, row) for where, ops in kinds for row in (*lowered(ops), *raised(ops))]
    if wrong:
        where, row = wrong[0]
        reason = f"in {where} the compiler has changed what the plan says: {_said(row)}"
        return Check(name, CheckStatus.FAIL, float(len(wrong)), 0.0, reason)
    if not any(row.compiled for _, ops in kinds for row in ops):
        reason = "the compiled graphs have no product, sum or exponential to look at"
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, reason, required=False)
    reason = "products, sums and exponentials are compiled in the dtypes of the plan"
    return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)


def _said(row: OperatorCount) -> str:
    return f"{row.op} in {row.dtype}, {row.compiled} where {row.traced} were traced"


def _gradients_check(parity: CompiledParity, limits: Thresholds) -> Check:
    name, limit, step = "compiled.gradients", limits.gradient_rel_l2, parity.step
    if step is None:
        required = parity.step_failed
        return Check(name, CheckStatus.UNCHECKED, None, limit, parity.no_step, required=required)
    error = step.rel_l2
    if step.missing:
        reason = (
            f"{len(step.missing)} parameter(s), first {step.missing[0]}, have a gradient in one of "
            "the two alone, or one that is not finite"
        )
        return Check(name, CheckStatus.FAIL, error, limit, reason)
    reason = (
        f"the gradients of a compiled step differ from FP32's by {error:.3g} (relative L2 of all), "
        f"those of the mixed model by {step.eager_rel_l2:.3g} before it is compiled"
    )
    if 0 <= error <= limit and math.isfinite(step.loss):
        return Check(name, CheckStatus.PASS, error, limit, reason)
    if not step.eager_rel_l2 <= limit and error <= 1.5 * step.eager_rel_l2:
        return Check(name, CheckStatus.UNCHECKED, error, limit, reason, required=False)
    return Check(name, CheckStatus.FAIL, error, limit, reason)


def _performance_check(parity: CompiledParity, slow_kernels: str) -> Check:
    name = "compiled.performance"
    times = {cost.arm: cost.milliseconds for cost in parity.forward}
    native, frozen = (times.get(arm) for arm in ("autocast", "frozen"))
    if not native or not frozen:
        reason = "no forward pass of both was timed"
        return Check(name, CheckStatus.UNCHECKED, None, 1.0, reason, required=False)
    said = f"a compiled forward pass takes {frozen:.3g} ms frozen, {native:.3g} ms under autocast"
    if slow_kernels:
        said = f"{slow_kernels}; {said}"
    passed = not slow_kernels and frozen <= native
    status = CheckStatus.PASS if passed else CheckStatus.UNCHECKED
    return Check(name, status, native / frozen, 1.0, said, required=False)
