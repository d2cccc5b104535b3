"""The captured FP32 model with an eye on the gradients of its intermediate values.

Its graph is run node by node with a hook on every differentiable result, which reduces the result's
gradient to a histogram of exponents the moment that autograd makes it; no gradient is kept. A value
that shares its memory with one that its node reads (a view, the access to a tuple) has the other's
gradient, moved, and is not counted again. Nor are values in a branch of a condition, which runs as
a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.nest import one_branch
from amp_convert.capture.captured import Captured, Region
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.exponent_histogram import Exponents
from amp_convert.core.mode import Mode


class GradientProbe:
    """The captured FP32 model, callable as the original is; its activation gradients by node.

    A model that was captured in parts runs as it is, each captured part replaced by its graph; only
    values inside the parts are seen then. `seen` has (info, exponents) by the node's identity, over
    all calls, filled by the backward pass.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured.in_mode(Mode.TRAIN)
        self.seen: dict[str, tuple[NodeInfo, Exponents]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        regions = self._captured.regions
        if self._captured.is_whole:
            return self._run(regions[0], Mode.TRAIN, args, kwargs)
        try:
            for region in regions:
                region.module.__dict__["forward"] = partial(self._forward, region)
            return self._captured.model(*args, **kwargs)
        finally:
            for region in regions:
                region.module.__dict__.pop("forward", None)

    def _forward(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        return self._run(region, Mode.of(region.module.training), args, kwargs)

    def _run(
        self, region: Region, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        runner = mode_runner(region, mode)
        inputs = runner.inputs(args, kwargs)
        running = _HookedInterpreter(
            one_branch(runner.graph_module), region.graphs[mode].nodes, self._hook
        )
        return runner.finish(running.run(*inputs, enable_io_processing=False), inputs)

    def _hook(self, info: NodeInfo, tensor: torch.Tensor) -> None:
        exponents = self.seen.setdefault(info.identity, (info, Exponents()))[1]
        tensor.register_hook(partial(_take, exponents))


def _take(exponents: Exponents, gradient: torch.Tensor | None) -> None:
    if gradient is not None:
        exponents.add(real_gradient(gradient))


class _HookedInterpreter(fx.Interpreter):
    """Runs a graph, and calls `hook` on every differentiable result that is not a view."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        nodes: Mapping[str, NodeInfo],
        hook: Callable[[NodeInfo, torch.Tensor], None],
    ) -> None:
        super().__init__(graph_module)
        self._nodes, self._hook = nodes, hook

    def run_node(self, n: fx.Node) -> Any:
        read = {_memory(t) for source in n.all_input_nodes for t in _tensors(self.env[source])}
        result = super().run_node(n)
        if (info := self._nodes.get(n.name)) is not None:
            for leaf in _tensors(result):
                if leaf.requires_grad and _memory(leaf) not in read:
                    self._hook(info, leaf)
        return result


def mode_runner(region: Region, mode: Mode) -> GraphRunner:
    """The captured FP32 graph of `mode`. Raises UnsupportedModelError where there is none."""
    if mode not in region.graphs:
        raise UnsupportedModelError(
            f"this model was captured for inference only: {region.train_failure}",
            mend="Make its forward pass exportable in training mode.",
        )
    return region.runner(mode)


def real_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as a dense tensor of real numbers."""
    if gradient.layout is not torch.strided:  # of an embedding
        gradient = gradient.to_dense()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
    ]


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
