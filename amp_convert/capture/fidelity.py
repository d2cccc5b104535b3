"""Is the captured FP32 graph the model? Checked on every run, before anything is converted.

Eager model and captured graph run once each on the example inputs with the same random state, then
backward from the same random cotangents. Outputs, parameter gradients and buffers are compared bit
for bit. Buffers and random state are put back afterwards, so checking leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_call import in_mode
from amp_convert.core import device as devices
from amp_convert.core.errors import first_line, refuse_environment
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.random_state import preserved_rng, rng_state
from amp_convert.core.tensor_errors import larger
from amp_convert.core.tree_paths import leaves_by_path


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


@dataclass(frozen=True)
class _Trace:
    """What one run leaves behind, by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    drawn: list[str]
    custom: list[str]


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
        eager = _trace(module, module, args, kwargs, mode, device, backward=backward)
    except Exception as error:  # noqa: BLE001  some models can be run but not differentiated
        refuse_environment(error)
        if not backward:
            return unchecked(mode, f"the eager model fails in {mode} mode: {error}")
        backward, without = False, f"; gradients were not compared: {first_line(error)}"
        try:
            eager = _trace(module, module, args, kwargs, mode, device, backward=backward)
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
        eager = _trace(module, module, args, kwargs, mode, device, backward=False)
        graph = _trace(module, captured, args, kwargs, mode, device, backward=False)
    return _compared(mode, eager, graph, without)


def _graph_trace(
    module: nn.Module,
    captured: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    eager: _Trace,
    *,
    backward: bool,
) -> tuple[_Trace | None, str]:
    """What the graph gives; or nothing, and why it has not the model's gradients."""
    device = devices.of_model(module)
    try:
        graph = _trace(
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


def _compared(mode: Mode, eager: _Trace, graph: _Trace, without: str) -> Fidelity:
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


def _trace(
    module: nn.Module,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    device: torch.device,
    *,
    backward: bool,
    known: Mapping[str, torch.Tensor] | None = None,
) -> _Trace:
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
    # Before the call, which may put other things into a dict or list that it is given.
    given = leaves_by_path((args, kwargs))
    with (
        in_mode(module, training=mode == Mode.TRAIN),
        preserved_rng(device),
        devices.exact_fp32(device),
        devices.plain_mode(device),
        torch.set_grad_enabled(backward),
    ):
        torch.manual_seed(0)
        before = rng_state(device)
        result = call(*args, **kwargs)
        custom = _custom_backwards(result) if backward else []
        drawn = before.drawn_outside_torch(rng_state(device))
        gradients = _gradients(module, result, known or {}) if backward else {}
        outputs = {
            path: leaf.detach().clone()
            for path, leaf in leaves_by_path(result)
            if isinstance(leaf, torch.Tensor)
        }
        buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        for path, leaf in given:
            if isinstance(leaf, torch.Tensor):  # the model may write to what it is given
                outputs[f"input {path}"] = leaf.detach()
    return _Trace(outputs, gradients, buffers, drawn, custom)


def _custom_backwards(result: Any) -> list[str]:
    """The `torch.autograd.Function` classes of the user's that a result comes from."""
    pending = [t.grad_fn for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    seen: set[Any] = set()
    found: dict[str, None] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not _is_operators(node):
            found[type(node).__name__.removesuffix("Backward")] = None
        pending += [source for source, _ in node.next_functions]
    return list(found)


def _is_operators(node: torch.autograd.function.BackwardCFunction) -> bool:
    """Whether a backward is that of a higher-order operator of PyTorch's, such as `torch.cond`."""
    module: str = type(node)._forward_cls.__module__  # type: ignore[attr-defined]
    return module.startswith("torch._higher_order_ops.")


def _gradients(
    module: nn.Module, result: Any, known: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of every parameter from seeded random cotangents on every differentiable output.

    One that is identical to the `known` one is that tensor, and what was computed is dropped on the
    way: two whole sets of gradients are never held.
    """
    outputs = [t for t in pytree.tree_leaves(result) if is_float_tensor(t) and t.requires_grad]
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not outputs or not wanted:
        return {}
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.device, t.dtype)
        for t in outputs
    ]
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in wanted.values()):
        # What the user has hung there, such as an optimizer, is not to run.
        found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        maybe: list[torch.Tensor | None] = list(found)
        return {n: g for n, g in zip(wanted, maybe, strict=True) if g is not None}
    gradients: dict[str, torch.Tensor] = {}

    def take(name: str, parameter: torch.Tensor) -> None:
        have, parameter.grad = parameter.grad, None
        assert have is not None
        same = name in known and identical(known[name], have)
        gradients[name] = known[name] if same else have

    before = [(parameter, parameter.grad) for parameter in wanted.values()]
    hooks = [
        p.register_post_accumulate_grad_hook(partial(take, name)) for name, p in wanted.items()
    ]
    try:
        for parameter in wanted.values():
            parameter.grad = None
        torch.autograd.backward(outputs, cotangents, inputs=list(wanted.values()))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in before:
            parameter.grad = gradient
    return gradients


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits, NaN equal to NaN."""
    a, b = _strided(a), _strided(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """A sparse gradient (of an embedding) as the tensor it stands for."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def rel_l2(want: torch.Tensor, have: torch.Tensor) -> float:
    if identical(want, have):
        return 0.0
    if want.shape != have.shape or not want.is_floating_point():
        return float("inf")
    want, have = _strided(want), _strided(have)
    reference = want.double()
    return float((have.double() - reference).norm() / reference.norm())
