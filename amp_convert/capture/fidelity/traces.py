"""What one run of a model, or of its graph, leaves behind: outputs, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.random_state import preserved_rng, rng_state
from amp_convert.core.tree_paths import leaves_by_path


@dataclass(frozen=True)
class Trace:
    """What one run leaves behind, by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    drawn: list[str]
    custom: list[str]


def traced(
    module: nn.Module,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    device: torch.device,
    *,
    backward: bool,
    known: Mapping[str, torch.Tensor] | None = None,
) -> Trace:
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
    return Trace(outputs, gradients, buffers, drawn, custom)


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
