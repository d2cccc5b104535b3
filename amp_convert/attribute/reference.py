"""The FP32 model, run so that the error of each node is known and each value has a gradient.

A model that was captured whole is its graph. One that was captured in parts runs as it is, with the
`forward` of each part replaced by its FP32 graph: what lies between the parts is differentiated as
any eager code is. Its own parameters want no gradient meanwhile, so that none is left behind.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from amp_convert.attribute.local_errors import Site, local_errors
from amp_convert.attribute.trials import outputs_with
from amp_convert.capture.captured import Region
from amp_convert.capture.in_mode import in_mode
from amp_convert.core.mode import Mode
from amp_convert.core.module_state import other_tensors
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.core.tree_paths import map_tensors
from amp_convert.rewrite.converted_model import ConvertedModel

Visited = Callable[[Region, Sequence[Any]], Sequence[Any]]
"""What runs a part's graph on flat inputs, and gives its flat outputs."""


@dataclass(eq=False)
class Ran:
    """What a run gave: the user's outputs of FP32 and of the converted model, the sites in the
    order of execution, and the nodes that a ranking node which chooses others ranks by."""

    outputs: Any = None
    mixed: Any = None
    sites: list[Site] = field(default_factory=list)
    ranked_by: list[str] = field(default_factory=list)


class Reference:
    """Runs one call, given as copies of its inputs."""

    def __init__(self, converted: ConvertedModel, *, floor: bool, casts: bool) -> None:
        self._converted, self._captured = converted, converted.captured
        self._floor, self._casts = floor, casts
        self._state = rng_state(self._captured.device)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Ran:
        """Run FP32 with gradients on, and the converted model."""
        ran = Ran()
        calls: Counter[str] = Counter()

        def visited(region: Region, inputs: Sequence[Any]) -> Sequence[Any]:
            rewritten = self._converted.rewritten[region.path][Mode.EVAL]
            found = local_errors(
                rewritten, inputs, self._captured.device, floor=self._floor, casts=self._casts
            )
            for site in found.sites:
                site.call = calls[region.path]
            calls[region.path] += 1
            ran.sites += found.sites
            ran.ranked_by += found.ranked_by
            if self._captured.is_whole:
                ran.mixed = region.runner(Mode.EVAL).results(found.mixed)
            return found.reference

        with _frozen_parameters(self._captured.model):
            ran.outputs = self._called(args, kwargs, visited, differentiable=True)
        if not self._captured.is_whole:
            set_rng_state(self._captured.device, self._state)
            with in_mode(self._captured.model, training=False), torch.no_grad():
                ran.mixed = self._converted(*_copied(args), **dict(_copied(kwargs)))
        return ran

    def shifted(self, args: Sequence[Any], kwargs: Mapping[str, Any], sites: Sequence[Site]) -> Any:
        """The outputs of FP32 with the errors of `sites` added to their values."""
        calls: Counter[str] = Counter()

        def visited(region: Region, inputs: Sequence[Any]) -> Sequence[Any]:
            now = [site for site in sites if site.call == calls[region.path]]
            calls[region.path] += 1
            return outputs_with(region.graphs[Mode.EVAL], inputs, now)

        return self._called(args, kwargs, visited, differentiable=False)

    def _called(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        visited: Visited,
        *,
        differentiable: bool,
    ) -> Any:
        set_rng_state(self._captured.device, self._state)
        given, named = _copied(args), dict(_copied(kwargs))
        if self._captured.is_whole:
            region = self._captured.regions[0]
            runner = region.runner(Mode.EVAL)
            return runner.results(visited(region, runner.inputs(given, named)))
        with contextlib.ExitStack() as stack:
            # What the model writes to its state must not be seen by the next run.
            stack.enter_context(in_mode(self._captured.model, training=False))
            stack.enter_context(other_tensors(self._captured.model, _own_buffer))
            for region in self._captured.regions:
                stack.enter_context(_replaced(region, visited))
            with torch.set_grad_enabled(differentiable):
                return self._captured.model(*given, **named)


@contextlib.contextmanager
def _replaced(region: Region, visited: Visited) -> Iterator[None]:
    """The part's own module runs its graph meanwhile."""
    runner = region.runner(Mode.EVAL)

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = runner.inputs(args, kwargs)
        with torch.no_grad():
            outputs = visited(region, inputs)
        # What eager code does in place to a result must not change what a gradient is taken of.
        return map_tensors(torch.clone, runner.finish(outputs, inputs))

    region.module.__dict__["forward"] = forward
    try:
        yield
    finally:
        region.module.__dict__.pop("forward", None)


@contextlib.contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient meanwhile."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _own_buffer(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def _copied(value: Any) -> Any:
    """Inputs that may be written to, and that no gradient goes back to."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)
