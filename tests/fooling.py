"""What tests of this folder share."""

from __future__ import annotations

import torch
from torch import nn

import amp_convert as amp
from amp_convert.verdict.check import Check


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checks(run: amp.Run) -> dict[str, Check]:
    return {check.name: check for check in run.verdict.checks}


def failed(run: amp.Run) -> list[str]:
    return [check.name for check in run.verdict.checks if check.status == "fail"]


def in_fp32(run: amp.Run, guard: str) -> set[str]:
    """The nodes that a guard keeps in FP32."""
    return {decision.node for decision in run.plan.eval if decision.guard == guard}


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
