"""Where the time of a call goes: each arm's graph, timed operator by operator, and summed by layer.

FP32 and autocast run the captured FP32 graph, autocast under `torch.autocast`, which decides below
the operators of a graph as it does below those of the eager model. The mixed and the frozen model
run the graphs that they run, and what a pass has put in place of an operator counts for the layer
that reads it. The arms take turns; the median over the turns counts.

A time is what passes between two operators: on CUDA between events on the stream, so that an
operator that the host is late to launch counts as long as the GPU waits for it. Python runs between
any two, so the sum is more than a whole call takes: compare layers, and arms, with each other.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import UNTAKEN, OneBranch
from amp_convert.capture.branches.nest import Choice
from amp_convert.capture.captured import Region
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import preserved_rng
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.insert_casts import LAYER
from amp_convert.validate.inference.results import LayerTime

ARMS = ("fp32", "autocast", "mixed", "frozen")
TURNS = 5
BUDGET_SECONDS = 20.0
"""Past this no further turn is started; the first two, of which one warms up, always run."""


def layer_times(
    converted: ConvertedModel, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[LayerTime, ...]:
    """The time that each layer takes in each arm, on these inputs, the longest in FP32 first."""
    captured, device = converted.captured, converted.captured.device
    low, frozen = from_name(converted.plan.dtype), converted.freeze()
    calls = captured.calls(args, kwargs)
    plain, native = contextlib.nullcontext, partial(torch.autocast, device.type, dtype=low)
    exact = partial(devices.exact_fp32, device)
    arms = {
        arm: partial(_all_regions, graph_of, calls, device, around)
        for arm, graph_of, around in (
            ("fp32", _of_original, exact),
            ("autocast", _of_original, native),
            ("mixed", partial(_as_it_runs, converted.runner), plain),
            ("frozen", partial(_as_it_runs, frozen.runner), plain),
        )
    }
    found: dict[str, list[Counter[str]]] = defaultdict(list)
    with (
        in_mode(captured.model, training=False),
        in_mode(converted, training=False),
        torch.no_grad(),
        preserved_rng(device),
    ):
        begin = time.perf_counter()
        for turn in range(TURNS + 1):
            if turn > 1 and time.perf_counter() - begin > BUDGET_SECONDS:
                break
            for arm, timed in list(arms.items()):
                try:
                    taken = timed()
                except RuntimeError:  # autocast breaks some models: a result
                    if arm != "autocast":
                        raise
                    del arms[arm]
                    continue
                if turn:
                    found[arm].append(taken)
    layers = {layer for turns in found.values() for turn in turns for layer in turn}
    classes = {
        info.layer: info.modules[0].rpartition(".")[2] if info.modules else ""
        for region in captured.regions
        for info in region.graphs[Mode.EVAL].nodes.values()
    }
    rows = [
        LayerTime(
            layer, classes.get(layer, ""), *(_median(found.get(arm, []), layer) for arm in ARMS)
        )
        for layer in layers
    ]
    return tuple(sorted(rows, key=lambda row: (-row.fp32, row.layer)))


def _median(turns: Sequence[Counter[str]], layer: str) -> Any:
    return statistics.median(turn[layer] for turn in turns) if turns else None


Graph = tuple[GraphRunner, fx.GraphModule, Mapping[fx.Node, str]]
"""What runs a region: how it is called, its graph, and the layer of each node."""


def _all_regions(
    graph_of: Callable[[Region], Graph],
    calls: Sequence[tuple[Region, tuple[Sequence[Any], Mapping[str, Any]]]],
    device: torch.device,
    around: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Counter[str]:
    """Milliseconds by layer of all captured parts, called as the model calls them."""
    found: Counter[str] = Counter()
    for region, (args, kwargs) in calls:
        runner, graph_module, layers = graph_of(region)
        given = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        timer = _Timer(graph_module, layers, device)
        with around():
            timer.run(*runner.inputs(*given), enable_io_processing=False)
        found.update(timer.milliseconds())
    return found


def _of_original(region: Region) -> Graph:
    captured = region.graphs[Mode.EVAL]
    graph = captured.graph_module.graph
    known = {n: captured.nodes[n.name].layer for n in graph.nodes if n.name in captured.nodes}
    return captured.runner(region.module), captured.graph_module, known


def _as_it_runs(runner_of: Callable[[str], GraphRunner], region: Region) -> Graph:
    """The graph that runs, which knows the layers of the operators that passes left alone."""
    runner = runner_of(region.path)
    graph_module = runner.run.tuned  # type: ignore[attr-defined]
    return runner, graph_module, _layers_of(graph_module)


def _layers_of(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    known: dict[fx.Node, str] = {}
    for node in reversed(graph_module.graph.nodes):
        readers = [known[user] for user in node.users if user in known]
        layer = node.meta.get(LAYER, readers[0] if readers else None)
        if layer is not None:
            known[node] = layer
    return known


class _Timer(OneBranch):
    """Runs a graph, and takes the time after each operator."""

    def __init__(
        self, graph_module: fx.GraphModule, layers: Mapping[fx.Node, str], device: torch.device
    ) -> None:
        super().__init__(graph_module)
        self._layers, self._device = layers, device
        self._ends: list[tuple[str, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return super().run_node(n)
        if not self._ends:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._ends.append(("", self._now()))
        if n.op == "call_module" and isinstance(choice := self.fetch_attr(str(n.target)), Choice):
            return self._branch(choice, n)
        result = super().run_node(n)
        if result is not UNTAKEN:
            self._ends.append((self._layers.get(n, ""), self._now()))
        return result

    def _branch(self, choice: Choice, node: fx.Node) -> Any:
        """The branch that a condition takes, by its own operators."""
        condition, *operands = self.fetch_args_kwargs_from_env(node)[0]
        one, other = choice.branches
        taken: Any = one if condition else other
        inside = _Timer(taken, _layers_of(taken), self._device)
        inside._ends = self._ends
        return inside.run(*operands, enable_io_processing=False)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def milliseconds(self) -> Counter[str]:
        """The time of each layer."""
        found: Counter[str] = Counter()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for (_, begin), (layer, end) in pairwise(self._ends):
            on_stream = self._device.type == "cuda"
            found[layer] += begin.elapsed_time(end) if on_stream else (end - begin) * 1e3
        return found
