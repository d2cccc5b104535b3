"""`Captured`: a model and all that was captured of it. Plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator

from amp_convert.capture.branches.choices import BRANCH
from amp_convert.capture.export import CapturedGraph
from amp_convert.capture.fidelity import Fidelity
from amp_convert.capture.graph_call import GraphRunner, UnfitCallError
from amp_convert.capture.observed_calls import observed_calls
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode


@dataclass(frozen=True)
class Uncaptured:
    """A part of the model that stays eager FP32, the line of code that made it so, and what can be
    done about it."""

    layer: str
    reason: str
    location: str
    mend: str = ""


@dataclass(frozen=True)
class FixedSizes:
    """A graph whose sizes could not be left open, and why: it takes those of the example inputs."""

    layer: str
    mode: Mode
    reason: str


@dataclass(frozen=True)
class Value:
    """Shape and dtype of a tensor, for the example inputs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Trace:
    """What one run of a graph on the example inputs recorded, by FX name.

    `values` holds a `Value` a tensor, a tuple of them for a multi-output node, a number for a size,
    None otherwise.
    """

    values: Mapping[str, Any] = field(repr=False)
    macs: Mapping[str, int] = field(repr=False)


@dataclass(frozen=True)
class Region:
    """A part of the model (the whole of it when `path` is empty) and its captured graphs."""

    path: str
    module: nn.Module
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    graphs: Mapping[Mode, CapturedGraph] = field(repr=False)
    traces: Mapping[Mode, Trace] = field(repr=False)
    train_failure: str = ""

    def qualified(self, name: str) -> str:
        """A name inside the region as a name in the whole model."""
        return f"{self.path}.{name}" if self.path else name

    def input_key(self, path: str) -> str:
        """The name under which what is known of one of the region's inputs is kept."""
        return f"{self.path} input {path}"

    def runner(self, mode: Mode) -> GraphRunner:
        """The captured FP32 graph of `mode`, callable like the module."""
        return self.graphs[mode].runner(self.module)


Call = tuple[Sequence[Any], Mapping[str, Any]]
"""The (args, kwargs) of one call."""
RegionCall = tuple[Region, Call]
"""A region and the (args, kwargs) of one call of it."""


@dataclass(frozen=True)
class Captured:
    """A model and all that was captured of it."""

    model: nn.Module
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    regions: tuple[Region, ...]
    uncaptured: tuple[Uncaptured, ...]
    fidelity: tuple[Fidelity, ...]
    eager_macs: int = 0
    """Multiply-adds of what stays eager, for the example inputs in eval mode."""
    training: Captured | None = None
    """The parts to train with, where the train graphs of `regions` could not be had; only their
    train graphs count."""
    others: tuple[Call, ...] = field(default=(), repr=False)
    """Further calls that it was captured for: in the dimensions in which they differ it is
    dynamic."""
    eager_branches: bool = False
    """Whether what stays eager has a higher-order operator."""
    unmet: tuple[FixedSizes, ...] = ()
    """Sizes that were said to vary, and that the model fixes."""

    def in_mode(self, mode: Mode) -> Captured:
        """What runs in a mode."""
        return self.training if mode is Mode.TRAIN and self.training is not None else self

    def graphs(self) -> Iterator[tuple[Region, Mode]]:
        """Each graph that runs, as a region and the mode of it."""
        for mode in Mode:
            for region in self.in_mode(mode).regions:
                if mode in region.graphs:
                    yield region, mode

    def calls(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[RegionCall]:
        """What each region receives when the model is called with these inputs, in eval mode, in
        the order of the calls."""
        if self.is_whole:
            return [(self.regions[0], (args, kwargs))]
        by_path = {region.path: region for region in self.regions}
        observed = observed_calls(self.model, tuple(args), kwargs, set(by_path))
        return [(by_path[path], call) for path, call in observed]

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Why the graph of a model that was captured whole does not take a call; "" if it does."""
        if self.is_whole:
            try:
                self.regions[0].runner(Mode.EVAL).inputs(args, kwargs)
            except UnfitCallError as unfit:
                return unfit.what
        return ""

    @property
    def fixed_sizes(self) -> tuple[FixedSizes, ...]:
        """The graphs that take no sizes but those of the example inputs, and single sizes that do
        not vary as was said."""
        return self.unmet + tuple(
            FixedSizes(region.path, mode, graph.fixed_sizes)
            for region in self.regions
            for mode, graph in region.graphs.items()
            if graph.fixed_sizes
        )

    @property
    def has_branches(self) -> bool:
        """Whether the model has a higher-order operator, such as torch.cond. PyTorch compiles that
        anew where it runs, and not at all where something watches the operators inside."""
        graphs = [region.graphs[mode] for region, mode in self.graphs()]
        return (
            self.eager_branches
            or any(graph.has_choices for graph in graphs)
            or any(
                isinstance(node.target, HigherOrderOperator)
                for graph in graphs
                for node in graph.graph_module.graph.nodes
            )
        )

    @property
    def in_branches(self) -> frozenset[str]:
        """The nodes, by identity, that run in eval mode only where a condition says so, of those
        that give tensors."""
        regions = [(r.graphs[Mode.EVAL], r.traces[Mode.EVAL]) for r in self.regions]
        return frozenset(
            graph.nodes[node.name].identity
            for graph, trace in regions
            for node in graph.graph_module.graph.nodes
            if BRANCH in node.meta and isinstance(trace.values[node.name], Value | tuple)
        )

    @property
    def is_whole(self) -> bool:
        """Whether one graph holds the whole model."""
        return len(self.regions) == 1 and not self.regions[0].path

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where its graphs run."""
        return devices.of_model(self.model)
