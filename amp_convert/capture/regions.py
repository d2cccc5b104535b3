"""Case -> `Captured`: functional FP32 graphs of a model, for eval and for train, over its own
weights.

The whole model is tried first. Where it cannot be exported (control flow that depends on values,
such as a detection head), its children are tried one by one, outermost first: each part that can be
captured becomes a `Region`, and whatever lies outside stays eager FP32 and is listed in
`uncaptured`.

Each region's graphs are then checked against the eager model (see `fidelity`). A model that is
captured whole for inference and cannot be for training is captured in parts for training alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Call, Captured, Region, Uncaptured
from amp_convert.capture.fidelity import FidelityStatus
from amp_convert.capture.fidelity.of_regions import merged, of_region
from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.mac_counter import MacCounter
from amp_convert.capture.observed_calls import ModuleCall, calls_by_path
from amp_convert.capture.pytree_containers import register_containers
from amp_convert.capture.refusals import Refusal
from amp_convert.capture.sizes import python_len, said_sizes
from amp_convert.capture.traced_region import (
    CannotCaptureError,
    LeftEagerError,
    Wanted,
    hooked,
    traced_region,
)
from amp_convert.core import device as devices
from amp_convert.core.errors import (
    ModelError,
    UnsupportedModelError,
)
from amp_convert.core.mode import Mode
from amp_convert.core.random_state import preserved_rng

_log = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    train: bool = True,
    apart: Collection[str] = (),
    proofs: bool = True,
    others: Sequence[Call] = (),
    dynamic: object = None,
) -> Captured:
    """Capture `model` for calls like `model(*args, **kwargs)`; without `train` for inference only.
    Dimensions in which the `others`, the (args, kwargs) of further calls, differ stay dynamic, and
    those that the user's `dynamic` names (see `said_sizes`).
    With `proofs` the graphs are compared with the eager model even where that was done before with
    the same code and values; without, that result may come from the cache.

    The submodules at the paths `apart` become regions of their own, so that what is hooked to them
    runs; what lies around them stays eager.

    The model's weights, buffers, training flags and random state are left as they are. Raises
    UnsupportedModelError, naming the user's line, when no part of the model can be captured.
    """
    register_containers()
    said = said_sizes.checked({} if dynamic is None else dynamic)
    if said:
        others = [*others, said_sizes.larger_call(model, args, kwargs, said)]
    once = partial(_captured, model, args, kwargs, train, apart, proofs, others)
    captured = once()
    if _differs(captured):
        with python_len.plain_numbers(), contextlib.suppress(UnsupportedModelError):
            again = once()
            captured = captured if _differs(again) else again
    return said_sizes.held(captured, said) if said else captured


def _differs(captured: Captured) -> bool:
    """Whether a graph is not the eager model."""
    return any(found.status is FidelityStatus.DIFFERENT for found in captured.fidelity)


def _captured(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    train: bool,
    apart: Collection[str],
    proofs: bool,
    others: Sequence[Call],
) -> Captured:
    """`capture`, once."""
    args, kwargs = tuple(args), dict(kwargs)
    wanted = Wanted.BOTH if train else Wanted.EVAL
    regions: tuple[Region, ...]
    uncaptured: tuple[Uncaptured, ...] = ()
    problem = None
    if apart:
        problem = CannotCaptureError("", hooked(apart))
    else:
        try:
            regions = (traced_region(model, args, kwargs, "", wanted, others),)
        except CannotCaptureError as error:
            problem = error
    if problem is not None:
        _log.info("the model cannot be captured whole (%s); its parts are tried", problem.reason)
        calls = ((args, kwargs), *others)
        regions, uncaptured = _by_submodule(model, calls, problem, wanted, apart)
        for part in uncaptured:
            _log.info("%s stays eager: %s", part.layer or "the top level", part.reason)
        if not regions:
            raise UnsupportedModelError(
                f"no part of the model can be captured: {problem.reason}",
                where=problem.location,
                mend=problem.mend,
            ) from problem.__cause__
    checks = [(r.path, of_region(r, mode, proofs=proofs)) for r in regions for mode in Mode]
    untrainable = {path: found.untrainable for path, found in checks if found.untrainable}
    regions = tuple(_without_training(r, untrainable.get(r.path, "")) for r in regions)
    training = None
    custom = any(found.custom_backward for _, found in checks)
    if train and not custom and any(Mode.TRAIN not in region.graphs for region in regions):
        training = _for_training(model, ((args, kwargs), *others), regions, apart)
    if training is not None:
        checks = [(path, found) for path, found in checks if found.mode is Mode.EVAL]
        checks += [(r.path, of_region(r, Mode.TRAIN, proofs=proofs)) for r in training.regions]
    eager, compiles = _eager_macs(model, args, kwargs, regions) if uncaptured else (0, False)
    worst = merged(checks, _how_trained(regions) if training is not None else "")
    return Captured(
        model, args, kwargs, regions, uncaptured, worst, eager, training,
        eager_branches=compiles, others=tuple(others),
    )  # fmt: skip


def _for_training(
    model: nn.Module,
    calls: Sequence[Call],
    regions: Sequence[Region],
    apart: Collection[str],
) -> Captured | None:
    """The parts of a model that can be captured for training, where the model, or a part of it,
    cannot: it may draw at random what it computes, as wav2vec 2.0 skips layers."""
    failed = next(region for region in regions if Mode.TRAIN not in region.graphs)
    problem = CannotCaptureError("", LeftEagerError(Refusal(failed.train_failure, "")))
    found, left = _by_submodule(model, calls, problem, Wanted.TRAIN, apart)
    for part in left:
        _log.info("%s stays eager in training: %s", part.layer or "the top level", part.reason)
    args, kwargs = calls[0]
    return Captured(model, tuple(args), kwargs, found, left, ()) if found else None


def _eager_macs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], regions: Sequence[Region]
) -> tuple[int, bool]:
    """The multiply-adds of the whole model less those of its regions, so of what stays eager, and
    whether PyTorch compiles something in it, as it does a `torch.cond`."""
    device = devices.of_model(model)
    given = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    watched = mock.patch.object(torch, "compile", wraps=torch.compile)
    with (
        watched as compiles,
        in_mode(model, training=False),
        torch.no_grad(),
        preserved_rng(device),
    ):
        try:
            whole = MacCounter().count(lambda: model(*given[0], **given[1]))
        except NotImplementedError:  # of a torch.cond
            whole = 0
    if compiles.called:  # counted once, it would refuse to run until that is forgotten
        torch.compiler.reset()
    captured = sum(sum(region.traces[Mode.EVAL].macs.values()) for region in regions)
    return max(whole - captured, 0), compiles.called


# --- fallback by submodule -----------------------------------------------------------------------


def _by_submodule(
    model: nn.Module,
    of_model: Sequence[Call],
    error: CannotCaptureError,
    wanted: Wanted,
    apart: Collection[str],
) -> tuple[tuple[Region, ...], tuple[Uncaptured, ...]]:
    """Capture the outermost children that can be, for the first call of the model; list what stays
    eager."""
    calls, others = (calls_by_path(model, given) for given in (of_model[:1], of_model[1:]))
    regions: list[Region] = []
    uncaptured = [error.uncaptured]
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if id(child) in seen or next(child.parameters(), None) is None:
                continue
            seen.add(id(child))
            if inner not in calls:
                visit(child, inner)  # a container, or a part that the example inputs do not reach
                continue
            if any(path.startswith(f"{inner}.") for path in apart):
                uncaptured.append(Uncaptured(inner, error.reason, "", error.mend))
                visit(child, inner)
                continue
            try:
                more = others.get(inner, [])
                regions.append(_fitting_region(child, calls[inner], inner, wanted, more))
            except CannotCaptureError as failure:
                uncaptured.append(failure.uncaptured)
                visit(child, inner)

    visit(model, "")
    return tuple(regions), tuple(uncaptured)


def _fitting_region(
    module: nn.Module,
    calls: list[ModuleCall],
    path: str,
    wanted: Wanted,
    others: list[ModuleCall],
) -> Region:
    """A region captured for the first call that also takes every other call's inputs; in the
    dimensions in which those and the `others` differ it is dynamic."""
    region = traced_region(module, *calls[0], path, wanted, [*calls[1:], *others])
    region = _times(region, len(calls))
    runner = region.runner(Mode.EVAL)
    for args, kwargs in calls[1:]:
        try:
            runner.inputs(args, kwargs)
        except ModelError as cause:
            raise CannotCaptureError(path, cause) from cause
    if wanted is Wanted.TRAIN and (why := of_region(region, Mode.TRAIN).untrainable):
        raise CannotCaptureError(path, LeftEagerError(Refusal(why, "")))
    return region


def _times(region: Region, calls: int) -> Region:
    """The region with the multiply-adds of all its calls."""
    traces = {
        mode: dataclasses.replace(trace, macs={n: macs * calls for n, macs in trace.macs.items()})
        for mode, trace in region.traces.items()
    }
    return dataclasses.replace(region, traces=traces)


# --- results -------------------------------------------------------------------------------------


def _without_training(region: Region, why: str) -> Region:
    """The region without its train graph, if there is a reason: it trains another model."""
    if not why or Mode.TRAIN not in region.graphs:
        return region
    _log.warning("%s: its train graph is not used: %s", region.path or "the model", why)
    graphs, traces = ({Mode.EVAL: table[Mode.EVAL]} for table in (region.graphs, region.traces))
    return dataclasses.replace(region, graphs=graphs, traces=traces, train_failure=why)  # type: ignore[arg-type]


def _how_trained(regions: Sequence[Region]) -> str:
    """Why a model is captured in parts for training, as a clause."""
    failed = next(region for region in regions if Mode.TRAIN not in region.graphs)
    return f"; captured in parts for training, since in training {failed.train_failure}"
