"""Case -> `Captured`: functional FP32 graphs of a model, for eval and for train, over its own
weights.

The whole model is tried first. Where it cannot be exported (control flow that depends on values,
such as a detection head), its children are tried one by one, outermost first: each part that can be
captured becomes a `Region`, and whatever lies outside stays eager FP32 and is listed in
`uncaptured`.

A region's graphs are then run once on the inputs that the part really gets. That run checks the
graph against the eager model (see `fidelity`) and records every value's shape and dtype and every
node's multiply-adds, which planning needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture import fidelity
from amp_convert.capture.captured import Captured, Region, Trace, Uncaptured, Value
from amp_convert.capture.export import CapturedGraph, doubled_batch, export_graph
from amp_convert.capture.fidelity import Fidelity, FidelityStatus
from amp_convert.capture.graph_call import GraphRunner, in_mode
from amp_convert.capture.hooks import own_hooks_off
from amp_convert.capture.mac_counter import MacCounter
from amp_convert.capture.observed_calls import ModuleCall, observed_calls, user_line
from amp_convert.capture.pytree_containers import register_containers
from amp_convert.capture.refusals import Refusal, refusal_of
from amp_convert.core import device as devices
from amp_convert.core.errors import (
    ModelError,
    UnsupportedModelError,
    environment_problem,
    first_line,
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
) -> Captured:
    """Capture `model` for calls like `model(*args, **kwargs)`; without `train` for inference only.

    The submodules at the paths `apart` become regions of their own, so that what is hooked to them
    runs; what lies around them stays eager.

    The model's weights, buffers, training flags and random state are left as they are. Raises
    UnsupportedModelError, naming the user's line, when no part of the model can be captured.
    """
    register_containers()
    args, kwargs = tuple(args), dict(kwargs)
    wanted = _Wanted.BOTH if train else _Wanted.EVAL
    regions: tuple[Region, ...]
    uncaptured: tuple[Uncaptured, ...] = ()
    problem = None
    if apart:
        problem = _CannotCaptureError("", _hooked(apart))
    else:
        try:
            regions = (_region(model, args, kwargs, "", wanted),)
        except _CannotCaptureError as error:
            problem = error
    if problem is not None:
        _log.info("the model cannot be captured whole (%s); its parts are tried", problem.reason)
        regions, uncaptured = _by_submodule(model, args, kwargs, problem, wanted, apart)
        for part in uncaptured:
            _log.info("%s stays eager: %s", part.layer or "the top level", part.reason)
        if not regions:
            raise UnsupportedModelError(
                f"no part of the model can be captured: {problem.reason}",
                where=problem.location,
                mend=problem.mend,
            ) from problem.__cause__
    training = None
    if train and any(Mode.TRAIN not in region.graphs for region in regions):
        training = _for_training(model, args, kwargs, regions, apart)
    checks = [(region.path, _fidelity(region, mode)) for region in regions for mode in Mode]
    if training is not None:
        checks = [(path, found) for path, found in checks if found.mode is Mode.EVAL]
        checks += [(r.path, _fidelity(r, Mode.TRAIN)) for r in training.regions]
    untrainable = {path: found.untrainable for path, found in checks if found.untrainable}
    regions = tuple(_without_training(r, untrainable.get(r.path, "")) for r in regions)
    eager = _eager_macs(model, args, kwargs, regions) if uncaptured else 0
    merged = _merged(checks, _how_trained(regions) if training is not None else "")
    return Captured(model, args, kwargs, regions, uncaptured, merged, eager, training)


def _for_training(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    regions: Sequence[Region],
    apart: Collection[str],
) -> Captured | None:
    """The parts of a model that can be captured for training, where the model, or a part of it,
    cannot: it may draw at random what it computes, as wav2vec 2.0 skips layers."""
    failed = next(region for region in regions if Mode.TRAIN not in region.graphs)
    problem = _CannotCaptureError("", _LeftEagerError(Refusal(failed.train_failure, "")))
    found, left = _by_submodule(model, args, kwargs, problem, _Wanted.TRAIN, apart)
    for part in left:
        _log.info("%s stays eager in training: %s", part.layer or "the top level", part.reason)
    return Captured(model, args, kwargs, found, left, ()) if found else None


def _refuse_environment(cause: Exception) -> None:
    """Raises what the environment lacks, if that is what came of it: that is no model's fault."""
    if problem := environment_problem(cause):
        raise problem from cause


class _Wanted(Enum):
    """The graphs that a part is captured for: eval; train as well, where it can be had; or train
    above all, so that a part without is none."""

    EVAL = auto()
    BOTH = auto()
    TRAIN = auto()


class _LeftEagerError(Exception):
    """A reason of our own not to capture a part as a whole."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.reason)


def _hooked(paths: Collection[str]) -> _LeftEagerError:
    reason = f"a hook on {', '.join(sorted(paths))} has to run, which it does not in a graph"
    return _LeftEagerError(Refusal(reason, "Take the hook off to have all of it converted."))


class _CannotCaptureError(Exception):
    """One module could not be exported in eval mode."""

    def __init__(self, path: str, cause: Exception) -> None:
        refusal = cause.refusal if isinstance(cause, _LeftEagerError) else refusal_of(cause)
        self.path, self.reason, self.mend = path, refusal.reason, refusal.mend
        self.location = user_line(cause)
        super().__init__(self.reason)

    @property
    def uncaptured(self) -> Uncaptured:
        """The part as one that stays eager."""
        return Uncaptured(self.path, self.reason, self.location, self.mend)


def _region(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str, wanted: _Wanted
) -> Region:
    with own_hooks_off(module) if path else contextlib.nullcontext():
        return _traced_region(module, args, kwargs, path, wanted)


def _traced_region(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str, wanted: _Wanted
) -> Region:
    try:
        _refuse_state(module, args, kwargs)
        graphs = {Mode.EVAL: _graph(module, args, kwargs, Mode.EVAL, path)}
    except (ModelError, UnsupportedModelError):
        raise
    except Exception as cause:  # export fails in as many ways as user code does
        _refuse_environment(cause)
        raise _CannotCaptureError(path, cause) from cause
    train_failure = "" if wanted is not _Wanted.EVAL else "training was not asked for"
    try:
        if wanted is not _Wanted.EVAL:
            graphs[Mode.TRAIN] = _graph(module, args, kwargs, Mode.TRAIN, path)
    except Exception as cause:  # the eval graph is worth having without; fidelity says so
        _refuse_environment(cause)
        if wanted is _Wanted.TRAIN:
            raise _CannotCaptureError(path, cause) from cause
        train_failure = _CannotCaptureError(path, cause).reason
        _log.warning("%s: no train graph: %s", path or "the model", train_failure)
    try:
        traces = {mode: _record(graph, module, args, kwargs) for mode, graph in graphs.items()}
    except (RuntimeError, TypeError, ValueError) as error:
        _refuse_environment(error)
        raise ModelError(
            f"the model refuses its inputs: {type(error).__name__}: {first_line(error)}",
            mend="Give example inputs that the model takes.",
        ) from error
    return Region(path, module, args, kwargs, graphs, traces, train_failure)


def _refuse_state(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises where a module goes on from what the call before left in its attributes. What it
    raises itself comes from the export as well, which says more of it."""
    try:
        state = fidelity.carried_state(module, args, kwargs)
    except UnsupportedModelError:
        raise
    except Exception:  # noqa: BLE001  see above
        return
    if state:
        reason = f"what it keeps in its attribute {state[0]} changes what the next call gives"
        raise _LeftEagerError(
            Refusal(
                f"{reason}, and a graph holds one call for ever",
                "Register it as a buffer, or pass it in and return it.",
            )
        )


def _graph(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: Mode, path: str
) -> CapturedGraph:
    """The graph of one mode. A batch of one is traced as two, so that its size can vary; a model
    to which one and two are different things is traced as it is."""
    graph = export_graph(module, args, kwargs, mode, path)
    traced_args, traced_kwargs = doubled_batch(args, kwargs)
    if traced_args is args and traced_kwargs is kwargs:
        return graph
    runner = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    try:
        same = fidelity.check(module, runner, args, kwargs, mode).status != "different"
    except (RuntimeError, ModelError):
        same = False
    return graph if same else export_graph(module, args, kwargs, mode, path, dynamic=False)


# --- one recorded run ----------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shapes, dtypes and multiply-adds, but no values."""

    def __init__(self, graph_module: fx.GraphModule, counter: MacCounter) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Any] = {}
        self.macs: dict[str, int] = {}
        self._counter = counter

    def run_node(self, n: fx.Node) -> Any:
        result, self.macs[n.name] = self._counter.run(partial(super().run_node, n), n.target)
        self.values[n.name] = pytree.tree_map(_value, result) if n.op != "output" else None
        return result


def _value(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf if isinstance(leaf, int | float | bool) else None
    stride = leaf.stride() if leaf.layout is torch.strided else ()
    return Value(tuple(leaf.shape), stride, leaf.dtype, leaf.device)


def _record(
    graph: CapturedGraph, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Trace:
    runner = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    device = devices.of_model(module)
    with torch.no_grad(), preserved_rng(device):
        recorder = _Recorder(graph.graph_module, MacCounter())
        recorder.run(*runner.inputs(args, kwargs), enable_io_processing=False)
    return Trace(recorder.values, recorder.macs)


def _eager_macs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], regions: Sequence[Region]
) -> int:
    """The multiply-adds of the whole model less those of its regions: what stays eager."""
    device = devices.of_model(model)
    given = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with in_mode(model, training=False), torch.no_grad(), preserved_rng(device):
        whole = MacCounter().count(lambda: model(*given[0], **given[1]))
    captured = sum(sum(region.traces[Mode.EVAL].macs.values()) for region in regions)
    return max(whole - captured, 0)


# --- fallback by submodule -----------------------------------------------------------------------


def _by_submodule(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: _CannotCaptureError,
    wanted: _Wanted,
    apart: Collection[str],
) -> tuple[tuple[Region, ...], tuple[Uncaptured, ...]]:
    """Capture the outermost children that can be; list what stays eager."""
    calls: dict[str, list[ModuleCall]] = {}
    for path, call in observed_calls(model, args, kwargs):
        calls.setdefault(path, []).append(call)
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
                regions.append(_fitting_region(child, calls[inner], inner, wanted))
            except _CannotCaptureError as failure:
                uncaptured.append(failure.uncaptured)
                visit(child, inner)

    visit(model, "")
    return tuple(regions), tuple(uncaptured)


def _fitting_region(
    module: nn.Module, calls: list[ModuleCall], path: str, wanted: _Wanted
) -> Region:
    """A region captured for the first call that also takes every other call's inputs."""
    region = _region(module, *calls[0], path, wanted)
    runner = region.runner(Mode.EVAL)
    for args, kwargs in calls[1:]:
        try:
            runner.inputs(args, kwargs)
        except ModelError as cause:
            raise _CannotCaptureError(path, cause) from cause
    return region


# --- results -------------------------------------------------------------------------------------


def _fidelity(region: Region, mode: Mode) -> Fidelity:
    if mode not in region.graphs:
        return fidelity.unchecked(mode, f"the train graph was not captured: {region.train_failure}")
    with own_hooks_off(region.module) if region.path else contextlib.nullcontext():
        return fidelity.check(region.module, region.runner(mode), region.args, region.kwargs, mode)


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


def _merged(region: Sequence[tuple[str, Fidelity]], how_trained: str) -> tuple[Fidelity, ...]:
    """One result a mode: the worst over all regions, which it names when there are several."""
    rank = [FidelityStatus.IDENTICAL, FidelityStatus.UNCHECKED, FidelityStatus.DIFFERENT]
    merged = []
    for mode in Mode:
        found = [(path, f) for path, f in region if f.mode == mode]
        path, worst = max(found, key=lambda item: (rank.index(item[1].status), item[1].max_rel_l2))
        reason = f"{path}: {worst.reason}" if len(found) > 1 else worst.reason
        reason += how_trained if mode is Mode.TRAIN else ""
        merged.append(dataclasses.replace(worst, reason=reason))
    return tuple(merged)
