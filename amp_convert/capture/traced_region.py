"""One module -> `Region`: its graphs for eval and train, or why there are none.

A graph is run once on the inputs that the module really gets. That run records every value's shape
and dtype and every node's multiply-adds, which planning needs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum, auto
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture import fidelity
from amp_convert.capture.captured import Region, Trace, Uncaptured, Value
from amp_convert.capture.carried_state import carried_state
from amp_convert.capture.cast_words import Words, cast_words
from amp_convert.capture.export import CapturedGraph, export_graph
from amp_convert.capture.export_call import Varying, doubled_batch, varying
from amp_convert.capture.fidelity import FidelityStatus
from amp_convert.capture.hooks import own_hooks_off
from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.kept import graphs as kept_graphs
from amp_convert.capture.mac_counter import MacCounter
from amp_convert.capture.observed_calls import user_line
from amp_convert.capture.refusals import Refusal, refusal_of
from amp_convert.capture.sizes import python_len
from amp_convert.core import device as devices
from amp_convert.core.errors import (
    ModelError,
    UnsupportedModelError,
    first_line,
    refuse_environment,
)
from amp_convert.core.mode import Mode
from amp_convert.core.random_state import preserved_rng

_log = logging.getLogger(__name__)


class Wanted(Enum):
    """The graphs that a part is captured for: eval; train as well, where it can be had; or train
    above all, so that a part without is none."""

    EVAL = auto()
    BOTH = auto()
    TRAIN = auto()


class LeftEagerError(Exception):
    """A reason of our own not to capture a part as a whole."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.reason)


def hooked(paths: Collection[str]) -> LeftEagerError:
    reason = f"a hook on {', '.join(sorted(paths))} has to run, which it does not in a graph"
    return LeftEagerError(Refusal(reason, "Take the hook off to have all of it converted."))


class CannotCaptureError(Exception):
    """One module could not be exported in eval mode."""

    def __init__(self, path: str, cause: Exception) -> None:
        refusal = cause.refusal if isinstance(cause, LeftEagerError) else refusal_of(cause)
        self.path, self.reason, self.mend = path, refusal.reason, refusal.mend
        self.location = user_line(cause)
        super().__init__(self.reason)

    @property
    def uncaptured(self) -> Uncaptured:
        """The part as one that stays eager."""
        return Uncaptured(self.path, self.reason, self.location, self.mend)


def traced_region(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str,
    wanted: Wanted,
    others: Iterable[tuple[Any, Any]] = (),
) -> Region:
    """The graphs of a module; the dimensions in which its `others` calls differ stay dynamic.
    Raises CannotCaptureError where there are none."""
    vary = varying(module, (args, kwargs), others)
    trace = partial(_traced, module, args, kwargs, path, wanted, vary)
    key = f"{wanted.name} {sorted(vary)} {python_len.opens()}"
    with own_hooks_off(module) if path else contextlib.nullcontext():
        region = kept_graphs.region_of(module, args, kwargs, path, key, trace)
    _tell_of_sizes(region)
    return region


def _tell_of_sizes(region: Region) -> None:
    for mode, graph in region.graphs.items():
        if graph.fixed_sizes:
            name = region.path or "the model"
            _log.warning("%s: sizes are fixed in %s mode: %s", name, mode, graph.fixed_sizes)
        for given in graph.signature.user_inputs:
            if given.shape and given.shape[0] is not None:
                size = given.shape[0]
                _log.info("input %s: its first dimension is fixed at %d", given.path, size)


def _traced(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str,
    wanted: Wanted,
    vary: Varying,
) -> Region:
    words = {mode: cache(partial(cast_words, module, args, kwargs, mode)) for mode in Mode}

    def graph(mode: Mode) -> CapturedGraph:
        return _graph(module, args, kwargs, mode, path, words[mode], vary)

    try:
        _refuse_state(module, args, kwargs)
        graphs = {Mode.EVAL: graph(Mode.EVAL)}
    except (ModelError, UnsupportedModelError):
        raise
    except Exception as cause:  # export fails in as many ways as user code does
        refuse_environment(cause)
        raise CannotCaptureError(path, cause) from cause
    train_failure = "" if wanted is not Wanted.EVAL else "training was not asked for"
    try:
        if wanted is not Wanted.EVAL:
            graphs[Mode.TRAIN] = _graph(
                module, args, kwargs, Mode.TRAIN, path, words[Mode.TRAIN], vary
            )
    except Exception as cause:  # the eval graph is worth having without; fidelity says so
        refuse_environment(cause)
        if wanted is Wanted.TRAIN:
            raise CannotCaptureError(path, cause) from cause
        train_failure = CannotCaptureError(path, cause).reason
        _log.warning("%s: no train graph: %s", path or "the model", train_failure)
    try:
        traces = {mode: record(graph, module, args, kwargs) for mode, graph in graphs.items()}
    except (RuntimeError, TypeError, ValueError) as error:
        refuse_environment(error)
        raise ModelError(
            f"the model refuses its inputs: {type(error).__name__}: {first_line(error)}",
            mend="Give example inputs that the model takes.",
        ) from error
    return Region(path, module, args, kwargs, graphs, traces, train_failure)


def _refuse_state(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises where a module goes on from what the call before left in its attributes. What it
    raises itself comes from the export as well, which says more of it."""
    try:
        state = carried_state(module, args, kwargs)
    except UnsupportedModelError:
        raise
    except Exception:  # noqa: BLE001  see above
        return
    if state:
        reason = f"what it keeps in its attribute {state[0]} changes what the next call gives"
        raise LeftEagerError(
            Refusal(
                f"{reason}, and a graph holds one call for ever",
                "Register it as a buffer, or pass it in and return it.",
            )
        )


def _graph(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mode: Mode,
    path: str,
    words: Callable[[], Words],
    vary: Varying,
) -> CapturedGraph:
    """The graph of one mode. A batch of one is traced as two, so that its size can vary; a model
    to which one and two are different things is traced as it is. So is one with a `torch.cond`
    whose branches cannot both be computed: there they are left alone."""
    graph = export_graph(module, args, kwargs, mode, path, words=words, vary=vary)
    if graph.has_choices and not _can_be_looked_into(graph, module, args, kwargs):
        _log.info("%s: the branches of torch.cond are left alone", path or "the model")
        graph = export_graph(module, args, kwargs, mode, path, flat=False, words=words, vary=vary)
    traced_args, traced_kwargs = doubled_batch(args, kwargs)
    if traced_args is args and traced_kwargs is kwargs:
        return graph
    if _status(graph, module, args, kwargs) is not FidelityStatus.DIFFERENT:
        return graph
    flat = graph.has_choices
    return export_graph(module, args, kwargs, mode, path, dynamic=False, flat=flat, words=words)


def _can_be_looked_into(
    graph: CapturedGraph, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a graph with both branches of a condition is the module, and the branch that is not
    taken can be run for the shapes of its values."""
    try:
        record(graph, module, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return _status(graph, module, args, kwargs) is FidelityStatus.IDENTICAL


def _status(
    graph: CapturedGraph, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> FidelityStatus:
    """What comparing a graph with its module comes to; different where the graph does not run."""
    try:
        return fidelity.check(module, graph.runner(module), args, kwargs, graph.mode).status
    except (RuntimeError, ModelError):
        return FidelityStatus.DIFFERENT


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


def record(
    graph: CapturedGraph, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Trace:
    runner = graph.runner(module)
    device = devices.of_model(module)
    # Some operators write to buffers without saying so: `instance_norm` in training.
    kept = in_mode(module, training=graph.mode.is_training)
    with torch.no_grad(), preserved_rng(device), kept:
        recorder = _Recorder(graph.graph_module, MacCounter())
        recorder.run(*runner.inputs(args, kwargs), enable_io_processing=False)
    return Trace(recorder.values, recorder.macs)
