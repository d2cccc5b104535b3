"""The checks of a verdict other than those on the outputs: one function a check, pure.

Each takes evidence and returns a `Check` that passes on evidence only: what was not measured is
unchecked, and every comparison is written so that NaN fails it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from amp_convert.core.mode import Mode
from amp_convert.rules.rule_set import ask_for_fp32
from amp_convert.validate.inference.results import Stop
from amp_convert.verdict.check import Check, CheckStatus, optional
from amp_convert.verdict.thresholds import LEAST_WORK, Thresholds

if TYPE_CHECKING:
    from amp_convert.capture.fidelity import Fidelity
    from amp_convert.plan.plan import Decision, Plan
    from amp_convert.validate.inference.results import Divergence, NodeDivergence


def fidelity_check(mode: Mode, rows: Iterable[Fidelity], limits: Thresholds) -> Check:
    name, limit = f"fidelity.{mode}", limits.fidelity_rel_l2
    mine = [row for row in rows if row.mode == mode]
    if not mine:
        return Check(name, CheckStatus.UNCHECKED, None, limit, f"the {mode} graph was not compared")
    # One row a mode is the rule; of several, the worst speaks.
    checks = [_fidelity_row(name, row, limit) for row in mine]
    order: tuple[CheckStatus, ...] = (CheckStatus.FAIL, CheckStatus.UNCHECKED, CheckStatus.PASS)
    return min(checks, key=lambda check: order.index(check.status))


def _fidelity_row(name: str, row: Fidelity, limit: float) -> Check:
    compared = (row.outputs, row.gradients, row.buffers)
    if row.status == "identical" and row.max_rel_l2 == 0 and False not in compared:
        if row.outputs is None:
            return Check(
                name, CheckStatus.UNCHECKED, None, limit, "the model returns no tensor to compare"
            )
        parts = ("outputs", "gradients", "buffers")
        same = [part for part, found in zip(parts, compared, strict=True) if found]
        reason = f"{', '.join(same)}: the captured FP32 graph is bit-identical to the eager model"
        return Check(name, CheckStatus.PASS, 0.0, limit, reason)
    if row.status == "unchecked":
        return Check(name, CheckStatus.UNCHECKED, None, limit, row.reason or "no reason was given")
    # A difference of size 0 is one that the relative error does not show, so it cannot be excused.
    if 0 < row.max_rel_l2 <= limit:
        reason = f"not bit-identical, but within {limit:g}: {row.reason}"
        return Check(name, CheckStatus.PASS, row.max_rel_l2, limit, reason)
    return Check(
        name, CheckStatus.FAIL, row.max_rel_l2, limit, row.reason or "the captured graph differs"
    )


@optional
def capture_check(plan: Plan) -> Check:
    if not plan.uncaptured:
        return Check("capture.whole", CheckStatus.PASS, 0.0, 0.0, "the whole model was captured")
    first = plan.uncaptured[0]
    where = f"{first.layer or 'the top level'}: {first.reason}"
    reason = (
        f"{len(plan.uncaptured)} part(s) of the model stay in eager FP32 and were examined only "
        f"through the model's outputs; first {where}"
    )
    return Check("capture.whole", CheckStatus.UNCHECKED, float(len(plan.uncaptured)), 0.0, reason)


def low_precision_check(plan: Plan) -> Check:
    """A plan that converts nothing has perfect parity: only the `fp32` preset asks for that."""
    name = "plan.low_precision"
    floating = [decision for decision in plan.eval if decision.decided]
    low = sum(decision.low for decision in floating)
    if low:
        reason = f"{low} of {len(floating)} floating point nodes compute in {plan.dtype}"
        macs = plan.total_macs()
        work = plan.share_macs_low() if macs else low / len(floating)
        if work < LEAST_WORK:
            what = "multiply-adds" if macs else "nodes"
            reason += (
                f", but no more than {work:.2%} of the {what}: that is no conversion. See with "
                "amp-convert audit what keeps the rest in FP32; where that is meant, use --rules "
                f"fp32{_kept_for_large_inputs(floating)}"
            )
            return Check(name, CheckStatus.UNCHECKED, work, LEAST_WORK, reason)
        return Check(name, CheckStatus.PASS, float(low), 1.0, reason)
    if ask_for_fp32(plan.rules):
        reason = "the rules ask for FP32 throughout, so the outputs must be bit-identical"
        return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)
    kept = Counter(decision.rule for decision in floating).most_common(3)
    why = ", ".join(f"{rule} ({nodes})" for rule, nodes in kept) or "none"
    reason = (
        f"nothing computes in {plan.dtype}; floating point nodes by rule: {why}. "
        f"Where that is meant, use --rules fp32{_kept_for_large_inputs(floating)}"
    )
    return Check(name, CheckStatus.FAIL, 0.0, 1.0, reason)


def _kept_for_large_inputs(decisions: Iterable[Decision]) -> str:
    """What to do about nodes that only inputs unlike those of calibration keep in FP32."""
    from amp_convert.plan.guards.activation_range import ProbedRange

    kept = sum(decision.guard == ProbedRange.name for decision in decisions)
    if not kept:
        return ""
    return (
        f". {kept} node(s) stay FP32 for inputs far larger than those of calibration: where such "
        "cannot come, set probe_headroom = false under [guards] in a rules file"
    )


def nothing_ran(plan: Plan, divergence: Divergence | None) -> str:
    """Why there is no comparison to judge; empty when there is one."""
    if divergence is None and plan.device == "meta":
        return "the model is on the meta device, which holds no values"
    if divergence is None:
        return "the mixed graph was not run against FP32"
    return "" if divergence.batches > 0 else "no batch was compared"


def reference_check(plan: Plan, divergence: Divergence | None, limits: Thresholds) -> Check:
    """A graph is right only where the model takes the path that was traced: on every batch?"""
    name, limit = "fidelity.batches", limits.fidelity_rel_l2
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, limit, reason)
    error = divergence.reference_rel_l2
    if error <= limit:
        same = "bit for bit" if error == 0 else f"within {error:.1e}"
        reason = f"the FP32 reference is the eager model {same} on all {divergence.batches} batches"
        return Check(name, CheckStatus.PASS, error, limit, reason)
    if divergence.drawn_outside:
        reason = (
            f"the model draws from {' and '.join(divergence.drawn_outside)}'s random numbers while "
            "it runs, and a graph holds those of one draw for ever. Draw from torch"
        )
        return Check(name, CheckStatus.UNCHECKED, error, limit, reason)
    reason = (
        "on some batch the eager FP32 model gives other outputs than the graph that was captured "
        "from it: it takes another path there"
    )
    return Check(name, CheckStatus.FAIL, error, limit, reason)


def batches_check(plan: Plan, divergence: Divergence | None) -> Check:
    """Were all batches seen? Required, unless the user asked for fewer."""
    name = "batches.all"
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, None, reason)
    seen, given = divergence.batches, divergence.batches_given
    limit = None if given is None else float(given)
    if divergence.stopped is None:
        return Check(name, CheckStatus.PASS, float(seen), limit, f"all {seen} batches were seen")
    of = f"{seen} of {given} batches were seen" if given else f"{seen} batches were seen of more"
    asked = divergence.stopped == Stop.ASKED
    reason = f"{of}, as --batches asks for"
    if not asked:
        reason = f"{of}, since the time was up: give a larger --eval-seconds, or fewer batches"
    return Check(name, CheckStatus.UNCHECKED, float(seen), limit, reason, required=not asked)


def inputs_check(plan: Plan, divergence: Divergence | None) -> Check:
    """Do the batches say anything? Of placeholders of zeros, no range is that of real inputs."""
    name = "batches.inputs"
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, None, reason)
    if divergence.same_inputs and any(decision.low for decision in plan.eval):
        reason = (
            "every input is one and the same number throughout, such as zeros: the ranges that the "
            "plan rests on, and the errors, are not those of real inputs. Give real example_inputs "
            "or eval_batches"
        )
        return Check(name, CheckStatus.UNCHECKED, None, None, reason)
    return Check(name, CheckStatus.PASS, None, None, "the inputs hold different numbers")


@optional
def buffers_check(plan: Plan, divergence: Divergence | None) -> Check:
    """What adds up in buffers from call to call is not looked at: each batch starts anew."""
    name = "buffers.kept"
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, None, reason)
    written = [row.name for row in divergence.outputs if row.name.startswith("buffer ")]
    written += [f"attribute {name}" for name in divergence.kept_state]
    if written:
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        reason = (
            f"the model writes to its {written[0]}{more} in eval mode; every batch began with the "
            "same values, so an error that adds up from call to call was not looked at"
        )
        return Check(name, CheckStatus.UNCHECKED, float(len(written)), None, reason)
    reason = "the model keeps nothing from call to call in eval mode"
    return Check(name, CheckStatus.PASS, 0.0, None, reason)


def path_checks(divergence: Divergence | None) -> list[Check]:
    """Whether the code around the captured parts took the path that FP32 takes; none where it did.
    What that comes to is in the outputs."""
    if divergence is None or not divergence.parted_paths:
        return []
    reason = (
        f"on {divergence.parted_paths} of {divergence.node_batches} batches the code around the "
        "captured parts took another path than in FP32, such as another number of iterations; "
        "errors by node rest on the calls that both made"
    )
    parted = float(divergence.parted_paths)
    return [Check("capture.paths", CheckStatus.UNCHECKED, parted, 0.0, reason, required=False)]


def choice_checks(divergence: Divergence | None) -> list[Check]:
    """Whether what ranks in the model (topk, argmax, a router) chooses as FP32 does; none where
    nothing ranks. Other choices are no fault by themselves: the outputs say what they come to."""
    rows = [r for r in (divergence.nodes if divergence else ()) if r.choices_changed is not None]
    if not rows:
        return []
    worst = max(rows, key=lambda row: row.choices_changed or 0.0)
    share = worst.choices_changed or 0.0
    name, where = "nodes.choices", f"{worst.op} in {worst.layer or 'the top level'}"
    if not share:
        reason = "topk, argmax and their like choose what they do in FP32"
        return [Check(name, CheckStatus.PASS, 0.0, 0.0, reason, required=False)]
    reason = f"{where} chooses others than in FP32 for {share:.2%} of its choices: routes changed"
    return [Check(name, CheckStatus.UNCHECKED, share, 0.0, reason, required=False)]


def frozen_check(divergence: Divergence | None) -> Check:
    """The frozen model is what gets deployed; it must be the one that was judged."""
    name = "frozen.identical"
    same = divergence.frozen_identical if divergence else None
    if divergence is None or same is None:
        return Check(name, CheckStatus.UNCHECKED, None, None, "the frozen model was not run")
    if same and divergence.unfit:
        left = sum(unfit.batches for unfit in divergence.unfit)
        reason = (
            f"the frozen model does not take {left} of {divergence.batches} batches "
            f"({divergence.unfit[0].reason}); the converted model runs them operation by operation"
        )
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, reason)
    if same:
        reason = (
            f"the frozen model gives the mixed model's bits on all {divergence.batches} batches"
        )
        return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)
    reason = (
        "the frozen model's outputs are not those of the mixed model that was compared, or are NaN"
    )
    return Check(name, CheckStatus.FAIL, 1.0, 0.0, reason)


def nodes_check(plan: Plan, divergence: Divergence | None) -> Check:
    name = "nodes.finite"
    reason = nothing_ran(plan, divergence)
    if divergence is None or reason:
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, reason)
    bad = [row for row in divergence.nodes if row.nonfinite != 0 or _incomparable(row)]
    if bad:
        worst = max(bad, key=lambda row: row.nonfinite)
        reason = (
            f"{len(bad)} node(s) are NaN or infinite where FP32 is finite, or the reverse; first "
            f"{bad[0].node}, worst {worst.node} with {worst.nonfinite} elements"
        )
        return Check(name, CheckStatus.FAIL, float(len(bad)), 0.0, reason)
    seen = {row.node for row in divergence.nodes} - set(divergence.unvisited)
    missed = [decision.node for decision in plan.eval if decision.low and decision.node not in seen]
    behind = [node for node in missed if node in divergence.behind_parting]
    unreached = [node for node in missed if node not in behind]
    unreached += [node for node in divergence.untaken if node not in unreached]
    if unreached or not plan.eval:
        what = "the plan has no node"
        if unreached:
            what = (
                f"{len(unreached)} node(s) got no element on any of the {divergence.node_batches} "
                f"batch(es) on which nodes are compared, first {unreached[0]}: give some early "
                "that reach them (other experts, other branches)"
            )
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, what)
    if behind:  # said by capture.paths as well
        what = (
            f"{len(behind)} low node(s), first {behind[0]}, run only behind the point where the "
            "two models take other paths: they are judged by the outputs alone"
        )
        return Check(name, CheckStatus.UNCHECKED, None, 0.0, what, required=False)
    reason = f"none of {len(seen)} nodes is NaN or infinite where FP32 is finite"
    return Check(name, CheckStatus.PASS, 0.0, 0.0, reason)


def _incomparable(row: NodeDivergence) -> bool:
    """Whether an error is NaN: where FP32 is infinite, the mixed value is something else."""
    errors = (row.local_rel_l2, row.accumulated_rel_l2)
    return any(error is not None and math.isnan(error) for error in errors)
