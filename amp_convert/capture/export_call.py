"""A call as `torch.export` is to see it: arguments by name, no tensor twice, outputs flat."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_call import bind


def bound_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """A call's arguments by the names that the module's `forward` has for them."""
    call = inspect.signature(module.forward)
    bound = bind(call, args, kwargs)
    for name, value in bound.arguments.items():
        if call.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = dict(sorted(value.items()))  # no order of keywords is special
    return bound


def distinct(inputs: Any) -> Any:
    """The inputs with no tensor given twice: export would make one input of the two."""
    seen: set[int] = set()

    def own(leaf: torch.Tensor) -> torch.Tensor:
        if id(leaf) in seen:
            return leaf.detach().clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map_only(torch.Tensor, own, inputs)


@contextlib.contextmanager
def flat_outputs(
    module: nn.Module, call: inspect.Signature, kwargs: Mapping[str, Any]
) -> Iterator[list[pytree.TreeSpec]]:
    """While this is open, `module` returns the leaves of its outputs; their structure is appended
    to the list that this gives. Its signature, which is `call`, names each of the `kwargs`: PyTorch
    2.13 mistakes sizes that are given by the name of a `**kwargs`.

    Export would rebuild the outputs each time it retraces, and a container that makes tensors of
    its own while it is built (a key-value cache of transformers) then adds constants that nobody
    owns. A module whose forward hooks look at its outputs is left as it is.
    """
    found: list[pytree.TreeSpec] = []
    own, forward = module.__dict__.get("forward"), module.forward

    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(forward(*args, **kwargs))
        found.append(spec)
        return tuple(leaves)

    flat.__signature__ = explicit(call, kwargs)  # type: ignore[attr-defined]
    if not module._forward_hooks:
        module.__dict__["forward"] = flat
    try:
        yield found
    finally:
        if own is not None:
            module.__dict__["forward"] = own
        else:
            module.__dict__.pop("forward", None)


def explicit(call: inspect.Signature, kwargs: Mapping[str, Any]) -> inspect.Signature:
    """A signature with a parameter for each name that goes into `**kwargs`."""
    known = [p for p in call.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(known) == len(call.parameters):
        return call
    names = kwargs.keys() - {p.name for p in known}
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n in names]
    return call.replace(parameters=[*known, *more])


Varying = frozenset[tuple[int, int]]
"""Dimensions that vary besides the first of each tensor: (number of the leaf, dimension)."""


def varying(module: nn.Module, call: tuple[Any, Any], others: Iterable[tuple[Any, Any]]) -> Varying:
    """The dimensions of a call's tensors that have another size in one of the `others`; a call of
    another structure says nothing."""
    leaves, spec = pytree.tree_flatten(_arguments(module, call))
    found: set[tuple[int, int]] = set()
    for other in others:
        theirs, same = pytree.tree_flatten(_arguments(module, other))
        if same != spec:
            continue
        for number, (mine, its) in enumerate(zip(leaves, theirs, strict=True)):
            if isinstance(mine, torch.Tensor) and isinstance(its, torch.Tensor):
                sizes = zip(mine.shape[1:], its.shape[1:], strict=False)
                if mine.dim() == its.dim():
                    found |= {(number, d) for d, (a, b) in enumerate(sizes, 1) if a != b}
    return frozenset(found)


def _arguments(module: nn.Module, call: tuple[Any, Any]) -> dict[str, Any]:
    return dict(bound_arguments(module, *call).arguments)


def dynamic_shapes(arguments: Mapping[str, Any], vary: Varying) -> Any:
    """What `torch.export` is told: the first dimension of each tensor and those of `vary` are
    dynamic where the model allows it."""
    leaves, spec = pytree.tree_flatten(dict(arguments))
    auto = torch.export.Dim.AUTO
    told = [
        {0: auto, **{d: auto for n, d in vary if n == number}}
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
        else None
        for number, leaf in enumerate(leaves)
    ]
    return pytree.tree_unflatten(told, spec)


def doubled_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Inputs whose common batch size of 1 is doubled: export would burn in a size of 1."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return args, kwargs
    doubled_batch: tuple[Any, Any] = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.cat([t, t]), (args, kwargs)
    )
    return doubled_batch


def no_size_of_one(
    args: Sequence[Any], kwargs: Mapping[str, Any], vary: Varying
) -> tuple[Any, Any]:
    """Inputs whose sizes of 1 that vary are doubled, for the same reason."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    for number, d in sorted(vary):
        if leaves[number].shape[d] == 1:
            leaves[number] = torch.cat([leaves[number]] * 2, d)
    grown: tuple[Any, Any] = pytree.tree_unflatten(leaves, spec)
    return grown


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around an export: one that fails prints its half-made graph, and logs what its user cannot do
    much about."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    was_off, logger.disabled = logger.disabled, True
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logger.disabled = was_off
