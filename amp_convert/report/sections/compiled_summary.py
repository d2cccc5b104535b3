"""What a reader is shown of the model under `torch.compile`."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.report import text as fmt
from amp_convert.report.model import Unchecked
from amp_convert.report.sections.summary import worst_output
from amp_convert.validate.compiled.results import CompiledParity

ARMS = ("fp32", "autocast", "all low", "mixed", "frozen")


@dataclass(frozen=True)
class CompiledSummary:
    """`facts` are pairs of a name and what it is; `rows` have what was timed and the times by arm,
    as text."""

    facts: tuple[tuple[str, str], ...]
    arms: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def compiled_summary(compiled: CompiledParity | Unchecked) -> CompiledSummary | None:
    """The summary; None where nothing was compiled."""
    if isinstance(compiled, Unchecked) or compiled.failure:
        return None
    facts = []
    if worst := worst_output(compiled.outputs):
        facts.append(("output error of the compiled frozen model", fmt.error(worst.rel_l2)))
    if (step := compiled.step) is not None:
        both = f"{fmt.error(step.rel_l2)}, {fmt.error(step.eager_rel_l2)} before it is compiled"
        facts.append(("gradient error of a compiled training step", both))
    facts.append(("the first call, with compiling", f"{compiled.seconds:.3g} s"))
    if compiled.cuda_graphs:
        facts.append(("CUDA graphs", "allowed"))
    timed = {
        kind: {cost.arm: cost.milliseconds for cost in costs}
        for kind, costs in (("forward", compiled.forward), ("training step", compiled.training))
        if costs
    }
    arms = tuple(arm for arm in ARMS if any(arm in times for times in timed.values()))
    rows = tuple(
        (kind, tuple(fmt.milliseconds(times.get(arm)) for arm in arms))
        for kind, times in timed.items()
    )
    return CompiledSummary(tuple(facts), arms, rows)
