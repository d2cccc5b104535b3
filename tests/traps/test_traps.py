"""Every trap breaks natively as recorded, and holds when converted, without a retreat to FP32."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.plan.guards.activation_range import ProbedRange
from amp_convert.plan.planner import make_plan
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from tests.traps import cases
from tests.traps.trap import A16, H16, TRAPS, Built

for found in pkgutil.iter_modules(cases.__path__):
    importlib.import_module(f"{cases.__name__}.{found.name}")

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
INTEGERS_EQUAL = 0.99

every_trap = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(name)]) for name in TRAPS],
)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float16", "bfloat16"])


# --- what is run ---------------------------------------------------------------------------------


@functools.cache
def built(name: str) -> Built:
    """The one model of a trap that this process shares; nobody changes it."""
    return TRAPS[name].build()


def run(call: Any, args: tuple[Any, ...]) -> Any:
    """One forward pass from a fixed random state, on inputs of its own."""
    args = pytree.tree_map_only(torch.Tensor, torch.clone, args)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        return call(*args)


@functools.cache
def expected(name: str) -> Any:
    """What the eager FP32 model returns."""
    return run(*built(name))


@functools.cache
def captured(name: str) -> tuple[Captured, RangeStats]:
    """The trap's model captured and calibrated on its inputs: what both dtypes share."""
    model, args = built(name)
    found = capture(model, args, {}, train=False)
    return found, profile(found, [(args, {})])


@functools.cache
def converted(name: str, dtype: torch.dtype) -> ConvertedModel:
    """The trap's model converted with the default rules, as `amp_convert.convert` does."""
    found, stats = captured(name)
    return convert_captured(found, load_rules(["default"]), stats, dtype)


def native(name: str, route: str) -> Any:
    """What a native route returns, its low outputs brought back to FP32 as ours are."""
    model, args = built(name)
    dtype = getattr(torch, route.partition("-")[2])
    if route.startswith("autocast"):
        context: contextlib.AbstractContextManager[Any] = torch.autocast("cpu", dtype=dtype)
    else:
        model, context = copy.deepcopy(model).to(dtype), contextlib.nullcontext()
        args = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args
        )
    with context:
        outputs = run(model, args)
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.float() if t.dtype == dtype else t, outputs
    )


# --- what is compared ----------------------------------------------------------------------------


def fault(want: Any, have: Any, tolerance: float) -> str | None:
    """What is wrong with the outputs `have`, or None."""
    if pytree.tree_structure(want) != pytree.tree_structure(have):
        return "another structure"
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
    return next(filter(None, (_leaf_fault(a, b, tolerance) for a, b in pairs)), None)


def _leaf_fault(want: Any, have: Any, tolerance: float) -> str | None:
    if not isinstance(want, torch.Tensor):
        return None if type(want) is type(have) and want == have else f"{have!r}, not {want!r}"
    if (want.dtype, want.shape) != (have.dtype, have.shape):
        return f"{have.dtype} {tuple(have.shape)}, not {want.dtype} {tuple(want.shape)}"
    if not want.is_floating_point():
        share = float((want == have).double().mean()) if want.numel() else 1.0
        return None if share >= INTEGERS_EQUAL else f"{share:.1%} of the integers are equal"
    finite = want.isfinite()
    if not have[finite].isfinite().all():
        return "not finite"
    if not torch.equal(want[want.isinf()], have[want.isinf()]):
        return "other infinities"
    error = relative_error(want[finite], have[finite])
    return None if error <= tolerance else f"relative error {error:.2g}"


def relative_error(want: torch.Tensor, have: torch.Tensor) -> float:
    """The relative L2 error, computed in FP64."""
    want, have = want.double(), have.double()
    difference = float((have - want).norm())
    return difference / float(want.norm()) if difference else 0.0


def broken(name: str, route: str) -> bool:
    """Whether a native route gives a wrong answer, or none."""
    tolerance = TOLERANCE[getattr(torch, route.partition("-")[2])]
    try:
        return fault(expected(name), native(name, route), tolerance) is not None
    except (RuntimeError, IndexError, NotImplementedError, ValueError):
        return True


# --- batches unlike the calibration ---------------------------------------------------------------


def _with_a_spike(values: torch.Tensor) -> torch.Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    if values.numel():
        values.view(-1)[values.numel() // 2] = 1e4
    return values


HOSTILE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "100x": lambda values: values * 100,
    "spike": _with_a_spike,
    "negative": torch.neg,
}


def stays_finite(name: str, dtype: torch.dtype, batch: str) -> bool:
    """Whether the converted model runs, and is finite where FP32 is. A batch on which FP32 itself
    gives up, such as a matrix that has no factor or an index out of bounds, asks nothing."""
    model, args = built(name)
    args = pytree.tree_map_only(
        torch.Tensor, lambda t: HOSTILE[batch](t) if t.is_floating_point() else t, args
    )
    try:
        want = run(model, args)
    except (RuntimeError, IndexError):
        return True
    try:
        have = run(converted(name, dtype), args)
    except RuntimeError:
        return False
    return all(
        bool(b[a.isfinite()].isfinite().all())
        for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    )


def unprobed(stats: RangeStats) -> RangeStats:
    """What is known of ranges without such batches."""
    ranges = {name: replace(seen, probed=None) for name, seen in stats.ranges.items()}
    return replace(stats, ranges=ranges)


# A covariance that only just has a Cholesky factor in FP32 has none after a rounding.
NO_FACTOR = {"whitening_by_cholesky": frozenset({"spike"})}


# --- the tests -----------------------------------------------------------------------------------


@every_trap
@both_dtypes
def test_converted_model_holds(name: str, dtype: torch.dtype) -> None:
    """It is as good as FP32 on what it was calibrated with, and finite on batches that calibration
    saw nothing like. It retreats to FP32 for the latter alone."""
    have = run(converted(name, dtype), built(name)[1])
    assert fault(expected(name), have, TOLERANCE[dtype]) is None
    plan = converted(name, dtype).plan
    if any(decision.guard == ProbedRange.name for decision in plan.eval):
        found, stats = captured(name)
        plan = make_plan(found, load_rules(["default"]), unprobed(stats), dtype)
    assert plan.low_nodes() > 0
    assert plan.share_macs_low() >= TRAPS[name].min_share_macs
    lost = {batch for batch in HOSTILE if not stays_finite(name, dtype, batch)}
    assert lost <= NO_FACTOR.get(name, frozenset())


@every_trap
def test_the_trap_is_one(name: str) -> None:
    """The FP32 model gives finite values and not only zeros, and a native route breaks where that
    is recorded. Which ones do differs a little between processors, whose kernels round and
    accumulate in other places and refuse other dtypes."""
    for leaf in pytree.tree_leaves(expected(name)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            assert leaf[leaf.isfinite()].abs().max() > 0
    recorded = sorted(TRAPS[name].breaks)
    assert not recorded or any(broken(name, route) for route in recorded)


def test_there_are_enough_traps() -> None:
    assert len(TRAPS) >= 150
    assert sum(bool(trap.breaks & (A16 | H16)) for trap in TRAPS.values()) >= 140


def test_the_batches_known_to_be_lost_are_of_traps_that_exist() -> None:
    assert {*NO_FACTOR} <= {*TRAPS}
