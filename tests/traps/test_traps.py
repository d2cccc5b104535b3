"""Every trap breaks natively as recorded, and holds when converted, without a retreat to FP32."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.profile.calibrate import RangeStats, profile
from amp_convert.rewrite.converted_model import ConvertedModel, convert_captured
from amp_convert.rules.rule_set import load_rules
from tests.traps import cases
from tests.traps.trap import A16, H16, TRAPS, Built

for found in pkgutil.iter_modules(cases.__path__):
    importlib.import_module(f"{cases.__name__}.{found.name}")

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1.6e-1}
INTEGERS_EQUAL = 0.99

every_trap = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TRAPS]
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


# What leaves FP16's range on a batch 100 times larger than all that calibration saw, or with a
# value of 1e4 in it: the head room of the guards is less than that. One that is not listed has to
# hold. To leave the list, a node's range has to be bounded by that of its inputs, not measured.
_BOTH = """
    attention_scores_before_scaling branch_on_a_value checkpointed_block
    cosine_similarity_of_large_vectors cubes_overflow divided_by_a_sum_plus_1e8
    explicit_float_around_squares faint_probabilities_scaled_up gated_product_overflows
    global_response_norm_overflows gradient_magnitude_overflows gram_matrix_overflows
    layer_norm_by_hand_overflows outputs_of_every_kind rbf_kernel_of_cdist
    relative_position_buckets rms_norm_squares_overflow tied_autoencoder_overflows_once
    variance_pooling_overflows vector_norm_overflows whitening_by_cholesky
"""
_LARGER = """
    alibi_far_into_a_cache mask_added_finfo_min mask_added_minus_1e9 mask_assigned_in_place
    mask_buffer_finfo_min mask_buffer_times_zero mask_filled_minus_1e9 mask_log_of_tiny
    mask_minus_infinity mask_renormalised_1e13 mask_where_minus_1e12
    mask_where_tensor_minus_1e12 reparametrised_sample rotary_angles_from_einsum
    rotary_as_complex_numbers
"""
_SPIKE = """
    batch_norm_tiny_running_variance bilinear_pooling_overflows double_precision_part
    energy_in_decibels entropy_of_probabilities linear_attention_running_sums
    newton_iteration_for_a_root ridge_regression_head squared_relu_overflows
    stylegan_demodulation_overflows sum_pooling_overflows vanishing_product_scaled_up
    wide_conv_overflows
"""
TOO_LARGE = {
    **dict.fromkeys(_BOTH.split(), frozenset({"100x", "spike"})),
    **dict.fromkeys(_LARGER.split(), frozenset({"100x"})),
    **dict.fromkeys(_SPIKE.split(), frozenset({"spike"})),
}
# A covariance that only just has a Cholesky factor in FP32 has none after a rounding to BF16.
NO_FACTOR = {"whitening_by_cholesky": frozenset({"spike"})}


# --- the tests -----------------------------------------------------------------------------------


@every_trap
@both_dtypes
def test_converted_model_holds(name: str, dtype: torch.dtype) -> None:
    """It is as good as FP32 on what it was calibrated with, without a retreat to FP32, and finite
    on batches that calibration saw nothing like."""
    have = run(converted(name, dtype), built(name)[1])
    assert fault(expected(name), have, TOLERANCE[dtype]) is None
    plan = converted(name, dtype).plan
    assert plan.low_nodes() > 0
    assert plan.share_macs_low() >= TRAPS[name].min_share_macs
    lost = {batch for batch in HOSTILE if not stays_finite(name, dtype, batch)}
    known = TOO_LARGE if dtype == torch.float16 else NO_FACTOR
    assert lost <= known.get(name, frozenset())


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


def test_the_batches_known_to_be_too_large_are_of_traps_that_exist() -> None:
    assert {*TOO_LARGE, *NO_FACTOR} <= {*TRAPS}
