"""Faults of gradients."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.verdict.gradient_checks import gradients_check
from tests.benchmarks.hunt_models import Subject, named
from tests.training_evidence import parity


class _Scaled(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.factor, None


def gradient(subject: Subject, factor: float, luck: random.Random) -> bool:
    """The gradient of one layer's result times a factor; whether that is caught."""
    module = subject.mixed.rewritten[""]["train"].graph_module
    layers = [
        n for n in module.graph.nodes if str(n.target).startswith(("aten.linear", "aten.con"))
    ]
    node = luck.choice(layers)
    with module.graph.inserting_after(node):
        scaled = module.graph.call_function(_scaled, (node, factor))
    node.replace_all_uses_with(scaled, lambda user: user is not scaled)
    module.recompile()
    subject.mixed._run_rewritten()
    try:
        found = compare_gradients(
            subject.mixed, (subject.inputs[0],), {}, None, _loss, scale=1024.0, backoff=0.5
        )
    finally:
        scaled.replace_all_uses_with(node)
        module.graph.erase_node(scaled)
        module.recompile()
        subject.mixed._run_rewritten()
    return gradients_check(parity(gradients=found), subject.limits).status != "pass"


def _scaled(x: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(x, factor)  # type: ignore[no-untyped-call,no-any-return]


def _loss(outputs: Any, _: Any) -> Tensor:
    floats = [v for _, v in named(outputs) if v.is_floating_point()]
    return torch.stack([v.float().square().mean() for v in floats]).sum()
