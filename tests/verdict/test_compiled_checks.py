"""The checks on the model under `torch.compile`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from amp_convert.validate.compiled.results import CompiledParity, CompiledStep, OperatorCount
from amp_convert.validate.inference.results import ArmCost
from amp_convert.verdict.compiled_checks import compiled_checks
from amp_convert.verdict.thresholds import Thresholds
from tests.evidence import metric, output

LIMITS = Thresholds.for_dtype("float16")
STEP = CompiledStep(1.0, 1.0, 1e-3, 1e-3, (), ())


def parity(**changes: Any) -> CompiledParity:
    whole = CompiledParity(
        cuda_graphs=False,
        batches=1,
        outputs=(output(),),
        ops=(OperatorCount("aten.exp", "float32", 1, 1),),
        forward=(ArmCost("autocast", 2.0, None, ""), ArmCost("frozen", 1.0, None, "")),
        seconds=1.0,
        step=STEP,
    )
    return replace(whole, **changes)


def checks(slow_kernels: str = "", **changes: Any) -> dict[str, tuple[str, bool]]:
    found = compiled_checks(parity(**changes), LIMITS, slow_kernels=slow_kernels)
    return {c.name.removeprefix("compiled."): (c.status.value, c.required) for c in found}


PASS = {
    "outputs": ("pass", True),
    "precision": ("pass", True),
    "gradients": ("pass", True),
    "performance": ("pass", False),
}


def test_all_pass() -> None:
    assert compiled_checks(None, LIMITS) == []
    assert checks() == PASS


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"outputs": (output(rel_l2=0.5),)}, {"outputs": ("fail", True)}),
        ({"outputs": (output(rel_l2=math.nan),)}, {"outputs": ("fail", True)}),
        ({"ops": ()}, {"precision": ("unchecked", False)}),
        (
            {"ops": (OperatorCount("aten.exp", "float32", 1, 0),
                     OperatorCount("aten.exp", "float16", 0, 1))},
            {"precision": ("fail", True)},
        ),
        ({"step": None, "no_step": "none"}, {"gradients": ("unchecked", False)}),
        ({"step": replace(STEP, rel_l2=0.9)}, {"gradients": ("fail", True)}),
        ({"step": replace(STEP, rel_l2=math.nan)}, {"gradients": ("fail", True)}),
        ({"step": replace(STEP, loss=math.inf)}, {"gradients": ("fail", True)}),
        ({"step": replace(STEP, missing=("w",))}, {"gradients": ("fail", True)}),
        (
            {"step": replace(STEP, rel_l2=0.9, eager_rel_l2=0.8)},
            {"gradients": ("unchecked", False)},
        ),
        ({"step": replace(STEP, rel_l2=9.0, eager_rel_l2=0.8)}, {"gradients": ("fail", True)}),
        ({"step": None, "step_failed": True}, {"gradients": ("unchecked", True)}),
        ({"metrics": (metric(mixed=0.5),)}, {"outputs": ("fail", True)}),
        ({"metrics": (metric(),)}, {}),
        ({"forward": ()}, {"performance": ("unchecked", False)}),
        (
            {"forward": (ArmCost("autocast", 1.0, None, ""),
                         ArmCost("frozen", 2.0, None, ""))},
            {"performance": ("unchecked", False)},
        ),
    ],
)  # fmt: skip
def test_each_is_judged_by_itself(changes: dict[str, Any], found: dict[str, Any]) -> None:
    assert checks(**changes) == PASS | found


def test_a_device_without_fast_kernels_is_no_slow_model() -> None:
    assert checks("no instructions")["performance"] == ("unchecked", False)


@pytest.mark.parametrize("changes", [{"failure": "torch.compile fails: x"}, {"batches": 0}])
def test_what_was_not_compiled_leaves_the_verdict_open(changes: dict[str, Any]) -> None:
    assert checks(**changes) == {"outputs": ("unchecked", True)}
