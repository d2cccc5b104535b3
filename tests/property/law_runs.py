"""What the laws of graphs look at: runs, traces and signatures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_signature import Source
from amp_convert.plan.plan import Decision, Plan
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.insert_casts import Rewritten
from tests.staged import Recorder, Staged, decisions_of

MODES = ("eval", "train")


@dataclass(frozen=True)
class Trace:
    """What one call with backward leaves behind."""

    outputs: Any
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


pytree.register_dataclass(Trace)


@dataclass(frozen=True)
class Run:
    """A rewritten graph and the value of each of its nodes for the example inputs.

    `reference` has the values of the FP32 graph by name.
    """

    plan: Plan
    mode: str
    rewritten: Rewritten
    values: dict[fx.Node, Any]
    reference: dict[str, Any]

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.rewritten.graph_module.graph.nodes)

    @property
    def casts(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.name in self.rewritten.casts]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return decisions_of(self.plan, self.mode)

    @property
    def weights(self) -> set[Any]:
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        specs = self.rewritten.captured.signature.inputs
        pairs = zip(placeholders, specs, strict=True)
        return {node for node, spec in pairs if spec.source is not Source.USER}

    def result(self, decision: Decision) -> Any:
        return self.values[self.rewritten.values[decision.name]]

    def is_low(self, decision: Decision) -> bool:
        """Whether low precision is what the node computes in, by the values that were seen."""
        low = getattr(torch, self.plan.dtype)
        originals = self.rewritten.captured.graph_module.graph.nodes
        before = next(node for node in originals if node.name == decision.name)
        after = self.rewritten.values[decision.name]
        if after.name in self.rewritten.casts:  # a lookup delivers its result cast
            return True
        made = dtypes_of_fp32([self.reference[before.name]], [self.values[after]])
        read = dtypes_of_fp32(
            [self.reference[node.name] for node in read_by(before)],
            [self.values[node] for node in read_by(after)],
        )
        return low in made or set(read) == {low}


def dtypes_of_fp32(wants: list[Any], haves: list[Any]) -> list[torch.dtype]:
    """The dtypes in `haves` of what is FP32 in `wants`."""
    return [
        have.dtype
        for want, have in zip(leaves(wants), leaves(haves), strict=True)
        if is_tensor(want) and want.dtype == torch.float32
    ]


def runs_of(staged: Staged, mixed: ConvertedModel) -> Iterator[Run]:
    for mode in MODES:
        rewritten, inputs = mixed.rewritten[""][mode], staged.inputs(mode)
        values = Recorder(rewritten.graph_module).record(inputs)
        reference = Recorder(rewritten.captured.graph_module).record(inputs)
        named = {node.name: value for node, value in reference.items()}
        yield Run(mixed.plan, mode, rewritten, values, named)


def trace(staged: Staged, call: nn.Module, mode: str) -> Trace:
    """Forward and backward in `mode`, from the same random state and with buffers put back."""
    model = staged.model
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    call.train(mode == "train")
    torch.manual_seed(0)
    outputs = call(*staged.args)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(outputs):
        if is_tensor(leaf) and leaf.requires_grad:
            total = total + leaf.double().sum()
    gradients: dict[str, torch.Tensor] = {}
    if total.requires_grad:
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        gradients = {n: g for n, g in zip(names, found, strict=True) if g is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return Trace(outputs, gradients, buffers)


def consequences(decision: Decision) -> tuple[Any, ...]:
    """All of a decision but its reasons."""
    return (
        decision.node,
        decision.dtype,
        decision.low,
        decision.input_dtypes,
        decision.output_dtypes,
    )


def read_by(node: fx.Node) -> list[fx.Node]:
    return [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]


def leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def signature_of(value: Any) -> Any:
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


def signatures_of(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: signature_of(value) for name, value in values.items()}
