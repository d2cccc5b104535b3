"""Is the captured FP32 graph the model? Checked on every run, before anything is converted.

Eager model and captured graph run once each on the example inputs with the same random state, then
backward from the same random cotangents. Outputs, parameter gradients and buffers are compared bit
for bit. Buffers and random state are put back afterwards, so checking leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from torch import nn

from amp_convert.capture.fidelity.traces import Trace, identical, rel_l2, traced
from amp_convert.core import device as devices
from amp_convert.core.errors import first_line, refuse_environment
from amp_convert.core.mode import Mode
from amp_convert.core.tensor_errors import larger


class FidelityStatus(StrEnum):
    """What comparing a captured graph with the eager model came to."""

    IDENTICAL = "identical"
    DIFFERENT = "different"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Fidelity:
    """What comparing one captured graph with the eager model showed.

    `outputs`, `gradients` and `buffers` say whether they are bit-identical; None where there are
    none to compare. `max_rel_l2` is the largest relative L2 difference over all of them.
    `untrainable` says why the graph has not the model's gradients though its outputs are right, ""
    where it has.
    """

    mode: Mode
    status: FidelityStatus
    outputs: bool | None
    gradients: bool | None
    buffers: bool | None
    max_rel_l2: float
    reason: str
    untrainable: str = ""
    custom_backward: bool = False


def unchecked(mode: Mode, reason: str) -> Fidelity:
    """The result where no comparison was possible."""
    return Fidelity(mode, FidelityStatus.UNCHECKED, None, None, None, float("nan"), reason)


def check(
    module: nn.Module,
    captured: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    *,
    gradients: bool = True,
) -> Fidelity:
    """Compare `captured` with `module` in `mode`, in FP32: forward, and with `gradients` backward,
    which takes twice the memory of the weights."""
    device = devices.of_model(module)
    if not devices.has_values(module):
        return unchecked(mode, "the model's tensors hold no values that could be compared")
    backward, without = gradients, ""
    if not gradients:
        without = "; gradients were not compared, since training was not asked for"
    try:
        eager = traced(module, module, args, kwargs, mode, device, backward=backward)
    except Exception as error:  # noqa: BLE001  some models can be run but not differentiated
        refuse_environment(error)
        if not backward:
            return unchecked(mode, f"the eager model fails in {mode} mode: {error}")
        backward, without = False, f"; gradients were not compared: {first_line(error)}"
        try:
            eager = traced(module, module, args, kwargs, mode, device, backward=backward)
        except Exception as error:  # noqa: BLE001  the same
            refuse_environment(error)
            return unchecked(mode, f"the eager model fails in {mode} mode: {error}")
    if eager.drawn:
        return unchecked(
            mode,
            f"the model draws from {' and '.join(eager.drawn)}'s random numbers while it runs in "
            f"{mode} mode, and a graph holds those of one draw for ever: draw from torch",
        )
    graph, untrainable = _graph_trace(
        module, captured, args, kwargs, mode, eager, backward=backward
    )
    if untrainable and mode is Mode.TRAIN:
        custom = bool(eager.custom)
        return replace(
            unchecked(mode, untrainable), untrainable=untrainable, custom_backward=custom
        )
    if graph is None:
        without = f"; gradients were not compared: {untrainable}"
        eager = traced(module, module, args, kwargs, mode, device, backward=False)
        graph = traced(module, captured, args, kwargs, mode, device, backward=False)
    return _compared(mode, eager, graph, without)


def _graph_trace(
    module: nn.Module,
    captured: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    eager: Trace,
    *,
    backward: bool,
) -> tuple[Trace | None, str]:
    """What the graph gives; or nothing, and why it has not the model's gradients."""
    device = devices.of_model(module)
    try:
        graph = traced(
            module, captured, args, kwargs, mode, device, backward=backward, known=eager.gradients
        )
    except RuntimeError as error:  # an operator of the graph may have no derivative
        if not backward:
            raise
        return None, f"the captured graph has no gradients: {first_line(error)}"
    mine, theirs = eager.gradients, graph.gradients
    same = mine.keys() == theirs.keys() and all(identical(mine[n], theirs[n]) for n in mine)
    if eager.custom and not same:
        return None, f"torch.export drops the backward that {', '.join(eager.custom)} defines"
    return graph, ""


def _compared(mode: Mode, eager: Trace, graph: Trace, without: str) -> Fidelity:
    """The result of two traces; `without` says what they do not hold, as a clause."""
    verdicts: list[bool | None] = []
    worst = 0.0
    for want, have in (
        (eager.outputs, graph.outputs),
        (eager.gradients, graph.gradients),
        (eager.buffers, graph.buffers),
    ):
        if want.keys() != have.keys():
            verdicts.append(False)
            worst = larger(worst, float("inf"))
            continue
        verdicts.append(all(identical(want[n], have[n]) for n in want) if want else None)
        for name in want:
            worst = larger(worst, rel_l2(want[name], have[name]))
    outputs, gradients, buffers = verdicts
    if False not in verdicts:
        reason = f"captured FP32 graph and eager FP32 model agree bit for bit{without}"
        return Fidelity(mode, FidelityStatus.IDENTICAL, outputs, gradients, buffers, worst, reason)
    names = ("outputs", "gradients", "buffers")
    differing = [name for name, same in zip(names, verdicts, strict=True) if same is False]
    reason = (
        f"{' and '.join(differing)} of the captured FP32 graph differ from the eager model, "
        f"relative L2 {worst:.1e}; a model that takes another path while it is traced does this"
    )
    return Fidelity(mode, FidelityStatus.DIFFERENT, outputs, gradients, buffers, worst, reason)
