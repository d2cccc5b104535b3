"""The checks of a verdict on the model's outputs, mixed against FP32 and against native autocast.

The worst output decides, and the check's reason names it. An output of no elements equals its
reference but says nothing; when all are such, the checks are unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amp_convert.core.slices import LEAST
from amp_convert.verdict.check import Check, CheckStatus, optional, severity
from amp_convert.verdict.inference_checks import nothing_ran
from amp_convert.verdict.slice_checks import named, slice_checks
from amp_convert.verdict.thresholds import COSINE_SLACK, Thresholds, rounding_unit

if TYPE_CHECKING:
    from amp_convert.plan.plan import Plan
    from amp_convert.validate.inference.results import Divergence, OutputError

_NO_ELEMENT = "the model returned no element to compare"
_NO_FLOAT = "the model returns no floating point output"


def output_checks(
    plan: Plan, divergence: Divergence | None, limits: Thresholds, *, metrics_hold: bool = False
) -> list[Check]:
    """The checks of the converted model against FP32; `metrics_hold` is whether the user gives
    metrics, and all of them pass."""
    rows, missing = divergence.outputs if divergence else (), nothing_ran(plan, divergence)
    return checks_of_outputs("outputs", rows, missing, limits, metrics_hold=metrics_hold)


def checks_of_outputs(
    prefix: str,
    outputs: Sequence[OutputError],
    missing: str,
    limits: Thresholds,
    *,
    metrics_hold: bool = False,
) -> list[Check]:
    """The checks of some outputs against FP32, named `prefix`.finite and so on; all are unchecked
    where something is `missing`. `agreement` is there only where an output is integer or boolean,
    and none of real numbers where all are.
    """
    # An output without elements equals its reference, but says nothing about the others.
    rows = [row for row in outputs if row.elements > 0]
    reason = missing or ("" if rows else _NO_ELEMENT)
    if reason:
        rows = []
    whole = [row for row in rows if _is_discrete(row)]
    real = [row for row in rows if not _is_discrete(row)]
    # The cosine with a vector of zeros is undefined; the other three checks judge such an output.
    pointed = [row for row in real if row.ref_abs_max != 0]
    checks = [
        _structure_check(f"{prefix}.structure", outputs, missing),
        _finite_check(f"{prefix}.finite", rows, reason),
    ]
    if real or not whole:
        flat = reason or "every FP32 output is zero"
        checks += [
            _rel_l2_check(f"{prefix}.rel_l2", real, reason, limits.output_rel_l2),
            _cosine_check(f"{prefix}.cosine", pointed, flat, limits),
            _max_abs_check(f"{prefix}.max_abs", real, reason, limits.output_max_abs),
        ]
    closed = [row for row in outputs if row.dtype == "object" and not row.elements]
    if closed and not reason:
        why = (
            f"{named(closed[0])} is an object that cannot be looked into: return tensors, or "
            "register its class with torch.utils._pytree"
        )
        checks.append(Check(f"{prefix}.compared", CheckStatus.UNCHECKED, None, None, why))
    if whole:
        checks.append(_agreement_check(f"{prefix}.agreement", whole, limits.agreement))
    slices = slice_checks(prefix, rows, reason, limits, metrics_hold=metrics_hold)
    return [*checks, *(check for check in slices if real or check.name.endswith(".classes"))]


def _is_discrete(row: OutputError) -> bool:
    return row.dtype.startswith(("int", "uint", "bool", "object"))


def _within(error: float, limit: float) -> bool:
    return 0 <= error <= limit


def _worst(rows: Sequence[OutputError], error: Callable[[OutputError], float]) -> tuple[str, float]:
    """Name and error of the output of largest error."""
    row = max(rows, key=lambda candidate: severity(error(candidate)))
    return named(row), error(row)


def _structure_check(name: str, rows: Sequence[OutputError], missing: str) -> Check:
    """What one arm has and the other has not is wrong, whatever the tolerance."""
    if missing:
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, missing)
    wrong = [row for row in rows if row.misfits and row.misfit]
    count = float(sum(row.misfits for row in wrong))
    if not wrong:
        reason = "both arms have the same outputs, in the same shapes, on every batch"
        return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)
    first = min(wrong, key=lambda row: row.misfit.batch if row.misfit else 0)
    assert first.misfit is not None
    more = f", and {count - 1:.0f} more" if count > 1 else ""
    reason = (
        f"{named(first)} is {first.misfit.fp32} in FP32 and {first.misfit.mixed} mixed, on batch "
        f"{first.misfit.batch}{more}"
    )
    return Check(name, CheckStatus.FAIL, count, 0.0, reason)


def _finite_check(name: str, rows: Sequence[OutputError], missing: str) -> Check:
    if not rows:
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, missing)
    bad = max(rows, key=lambda row: row.nonfinite)
    # Where FP32 is NaN there was nothing to compare with, so such an output is not vouched for.
    blind = max(rows, key=lambda row: row.ref_nonfinite)
    if bad.nonfinite == 0 and blind.ref_nonfinite > 0:
        reason = f"{named(blind)}: {blind.ref_nonfinite} of {blind.elements} elements are NaN or"
        return Check(name, CheckStatus.UNCHECKED, 0.0, 0.0, f"{reason} infinite in FP32 already")
    if bad.nonfinite == 0:
        return Check(
            name, CheckStatus.PASS, 0.0, 0.0, "no output is NaN or infinite where FP32 is finite"
        )
    reason = f"{named(bad)}: {bad.nonfinite} of {bad.elements} elements are NaN or infinite"
    return Check(
        name, CheckStatus.FAIL, float(bad.nonfinite), 0.0, f"{reason} where FP32 is finite"
    )


def _rel_l2_check(name: str, rows: Sequence[OutputError], missing: str, limit: float) -> Check:
    if not rows:
        return Check(name, CheckStatus.UNCHECKED, None, limit, missing)
    which, error = _worst(rows, lambda row: row.rel_l2)
    tail = f"the smallest tolerance that would pass is {error:.3g}"
    if not math.isfinite(error):
        tail = "no tolerance would pass"
    reason = f"{which}: relative L2 error {error:.3g} against FP32; {tail}{_moved(rows)}"
    holds, noisy = _within(error, limit), _is_noise(rows, which, limit)
    status = CheckStatus.PASS if holds else CheckStatus.FAIL
    if noisy and not holds:
        status, reason = CheckStatus.UNCHECKED, f"{which}: relative L2 error {error:.3g}; {noisy}"
    return Check(name, status, error, limit, reason)


def _is_noise(rows: Sequence[OutputError], which: str, limit: float) -> str:
    """That FP32's own noise is out of tolerance in an output, as a clause; "" where it is not."""
    noise = next(row.noise_rel_l2 for row in rows if named(row) == which)
    if noise is None or _within(noise, limit):
        return ""
    return f"FP32 nudged by one ULP is off by {noise:.3g} as well: this says nothing of precision"


def _moved(rows: Sequence[OutputError]) -> str:
    """What to say of rows that were put back, as a clause."""
    row = max(rows, key=lambda row: row.moved)
    if not row.moved:
        return ""
    return (
        f"; {row.moved} of {row.rows} rows of {named(row)} changed places among near-equal scores"
    )


def _cosine_check(
    name: str, rows: Sequence[OutputError], missing: str, limits: Thresholds
) -> Check:
    limit, rel_l2 = limits.cosine, limits.output_rel_l2
    if not rows:
        return Check(name, CheckStatus.UNCHECKED, None, limit, missing)

    def distance(row: OutputError) -> float:
        return max(0.0, 1 - row.cosine) if row.cosine <= 1 + COSINE_SLACK else math.nan

    which, gap = _worst(rows, distance)
    cosine = 1 - gap
    reason = f"{which}: cosine {cosine:.6g} with FP32"
    status = CheckStatus.PASS if cosine >= limit else CheckStatus.FAIL
    if status is CheckStatus.FAIL and (noisy := _is_noise(rows, which, rel_l2)):
        status, reason = CheckStatus.UNCHECKED, f"{reason}; {noisy}"
    return Check(name, status, cosine, limit, reason)


def _max_abs_check(name: str, rows: Sequence[OutputError], missing: str, limit: float) -> Check:
    if not rows:
        return Check(name, CheckStatus.UNCHECKED, None, limit, missing)
    which, share = _worst(rows, lambda row: _max_abs_share(row, row.max_abs_err))
    reason = f"{which}: the largest error is {share:.3g} of the largest distance from the mean"
    status = CheckStatus.PASS if _within(share, limit) else CheckStatus.FAIL
    if status is CheckStatus.FAIL:
        row = next(row for row in rows if named(row) == which)
        noise = None if row.noise_max_abs is None else _max_abs_share(row, row.noise_max_abs)
        if noise is not None and noise > limit:
            reason += f"; FP32 nudged by one ULP is off by {noise:.3g} as well"
            status = CheckStatus.UNCHECKED
    return Check(name, status, share, limit, reason)


def _max_abs_share(row: OutputError, error: float) -> float:
    """An error relative to how far FP32 lies from its mean at most; of an output that holds one
    value throughout, relative to that."""
    size = row.ref_abs_max
    if row.elements >= LEAST:  # of fewer, a mean and a distance from it say nothing
        size = min(size, row.ref_deviation_max) or size
    if not math.isfinite(row.ref_abs_max):
        return math.nan
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def _agreement_check(name: str, rows: Sequence[OutputError], limit: float) -> Check:
    which, differing = _worst(rows, lambda row: row.mismatches / row.elements)
    share = 1 - differing
    reason = f"{which}: {share:.4%} of its elements equal FP32's"
    status = CheckStatus.PASS if limit <= share <= 1 else CheckStatus.FAIL
    return Check(name, status, share, limit, reason)


@optional
def autocast_check(plan: Plan, divergence: Divergence | None, limits: Thresholds) -> Check:
    """Errors under one rounding count as one: nobody can be three times better than that.

    An output for which native autocast gave no finite error is unchecked: it overflowed as well.
    """
    name, factor = "outputs.vs_autocast", limits.autocast_factor
    unit = rounding_unit(limits.dtype)
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, factor, reason)
    if not divergence.autocast_outputs:
        why = divergence.autocast_reason or "no reason was given"
        return Check(
            name, CheckStatus.UNCHECKED, None, factor, f"native autocast did not run: {why}"
        )
    native = {
        row.name: row.rel_l2
        for row in divergence.autocast_outputs
        if row.elements > 0 and math.isfinite(row.rel_l2)
    }
    rows = [row for row in divergence.outputs if row.elements > 0 and not _is_discrete(row)]
    if not rows:
        empty = any(not _is_discrete(row) for row in divergence.outputs)
        reason = _NO_ELEMENT if empty else _NO_FLOAT
        return Check(name, CheckStatus.UNCHECKED, None, factor, reason)
    known = [row for row in rows if row.name in native]

    def ratio(row: OutputError) -> float:
        return max(severity(row.rel_l2), unit) / max(native[row.name], unit)

    worst = max(known, key=ratio, default=None)
    if worst is None or (ratio(worst) <= factor and len(known) < len(rows)):
        first = next(row for row in rows if row.name not in native)
        reason = f"native autocast gave no finite error for {named(first)}"
        return Check(name, CheckStatus.UNCHECKED, None, factor, reason)
    reason = (
        f"{named(worst)}: relative L2 error {worst.rel_l2:.3g}, "
        f"native autocast's {native[worst.name]:.3g}"
    )
    if ratio(worst) <= factor:
        return Check(name, CheckStatus.PASS, ratio(worst), factor, reason)
    reason += ": more than the dtype accounts for"
    return Check(name, CheckStatus.FAIL, ratio(worst), factor, reason)
