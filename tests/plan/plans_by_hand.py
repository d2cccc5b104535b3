"""What tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amp_convert.plan.costs import Casts
from amp_convert.plan.plan import Decision, Plan
from tests import decisions


def decision(node: str, **changes: Any) -> Decision:
    said = {"name": "linear", "op": "aten.linear", "macs": 100, "layer": node.partition("/")[0]}
    return decisions.decision(node, **(said | changes))


def plan(*decisions: Decision, train: tuple[Decision, ...] = (), **changes: Any) -> Plan:
    base = Plan(
        dtype="float16",
        device="cpu",
        rules=("default.toml",),
        painting="grappler",
        calibration_batches=1,
        eval=decisions,
        train=train,
        eval_casts=Casts(),
        train_casts=Casts(),
        uncaptured=(),
        unmatched_rules=(),
    )
    return replace(base, **changes)
