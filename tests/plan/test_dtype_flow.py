"""Dtypes through hand-made graphs: what each precision casts, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from amp_convert.core.op_facts import facts_of_target
from amp_convert.plan.dtype_flow import (
    Precision,
)
from tests.plan.traced_values import Traced, effect, floats, mixed_sum

aten = torch.ops.aten


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# --- what each precision casts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "inputs", "result"),
    [
        (Precision.ORIGINAL, (F32, None), F32),
        (Precision.LOW, (None, F16), F16),
        (Precision.FULL, (F32, None), F32),
        (Precision.WIDEST, (F32, None), F32),
        (Precision.AS_IS, (None, None), F32),
    ],
)
def test_a_low_and_an_fp32_input(
    precision: Precision, inputs: tuple[torch.dtype | None, ...], result: torch.dtype
) -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW, "add": precision})
    assert effect(flows["mul"]) == ((F16, F16), F16)
    assert effect(flows["add"]) == (inputs, result)


@pytest.mark.parametrize(
    ("precision", "inputs", "result"),
    [
        (Precision.ORIGINAL, (F32, F32), F32),
        (Precision.LOW, (None, None), BF16),
        (Precision.FULL, (F32, F32), F32),
        (Precision.WIDEST, (None, None), BF16),
        (Precision.AS_IS, (None, None), BF16),
    ],
)
def test_two_low_inputs(
    precision: Precision, inputs: tuple[torch.dtype | None, ...], result: torch.dtype
) -> None:
    traced = Traced(lambda x: aten.add(y := aten.mul(x, x), y), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW, "add": precision}, low=BF16)
    assert effect(flows["add"]) == (inputs, result)


def test_a_node_that_is_not_decided_about_gets_its_original_dtypes() -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.LOW})
    assert effect(flows["add"]) == ((F32, None), F32)


def test_without_a_low_node_nothing_is_cast() -> None:
    traced = Traced(mixed_sum, floats(2, 3), floats(2, 3))
    flows = traced.flows({"mul": Precision.FULL, "add": Precision.WIDEST})
    assert {name: effect(flow) for name, flow in flows.items()} == {
        "mul": ((None, None), F32),
        "add": ((None, None), F32),
    }


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, F64, torch.complex64])
def test_integers_booleans_fp64_and_complex_values_are_never_cast(
    precision: Precision, dtype: torch.dtype
) -> None:
    traced = Traced(aten.mul, floats(2, 3), torch.ones(2, 3, dtype=dtype))
    flow = traced.flows({"mul": precision})["mul"]
    assert flow.inputs[1] is None
    assert flow.inputs[0] == (F16 if precision is Precision.LOW else None)


def test_what_the_model_itself_keeps_in_fp16_is_fp32_only_where_autocast_makes_it_so() -> None:
    """`x` is FP16 in the original. Lowering to BF16 leaves it alone."""
    traced = Traced(aten.add, floats(2, dtype=F16), floats(2))

    def inputs(precision: Precision) -> tuple[torch.dtype | None, ...]:
        return traced.flows({"add": precision}, low=BF16)["add"].inputs

    assert inputs(Precision.ORIGINAL) == (None, None)
    assert inputs(Precision.LOW) == (None, BF16)
    assert inputs(Precision.FULL) == inputs(Precision.WIDEST) == (F32, None)


# --- parameters that the kernel takes in FP32 ----------------------------------------------------


def test_batch_normalisation_keeps_its_statistics_and_parameters() -> None:
    def normalise(x: torch.Tensor, weight: torch.Tensor, running: torch.Tensor) -> Any:
        return aten._native_batch_norm_legit_no_training(
            aten.mul(x, x), weight, weight, running, running, 0.1, 1e-5
        )[0]

    traced = Traced(normalise, floats(2, 4, 3), floats(4), torch.ones(4))
    name = "_native_batch_norm_legit_no_training"
    for device in ("cpu", "cuda", "meta"):
        flow = traced.flows({"mul": Precision.LOW, name: Precision.LOW}, device=device)[name]
        assert flow.inputs == (None,) * 5
        assert flow.result[0] == F16
    picked = traced.flows({"mul": Precision.LOW, name: Precision.LOW})["getitem"]
    assert effect(picked) == ((), F16)


def test_the_saved_statistics_of_training_stay_fp32() -> None:
    """PyTorch's fake kernel calls them low; the real ones, and BatchNorm's backward, do not."""

    def normalise(x: torch.Tensor, weight: torch.Tensor, running: torch.Tensor) -> Any:
        return aten._native_batch_norm_legit_functional(
            aten.mul(x, x), weight, weight, running, running, True, 0.1, 1e-5
        )

    inputs = (floats(2, 4, 3), floats(4), torch.ones(4))
    traced, name = Traced(normalise, *inputs), "_native_batch_norm_legit_functional"
    flow = traced.flows({"mul": Precision.LOW, name: Precision.LOW})[name]
    low = inputs[0].half()
    real = aten._native_batch_norm_legit_functional(
        low * low, inputs[1], inputs[1], inputs[2], inputs[2], True, 0.1, 1e-5
    )
    assert tuple(flow.result) == tuple(t.dtype for t in real) == (F16, F32, F32, F32, F32)


@pytest.mark.parametrize(
    ("device", "inputs"), [("cpu", (F16, None, None)), ("cuda", (F16, F16, F16))]
)
def test_layer_normalisation_keeps_its_parameters_on_the_cpu_only(
    device: str, inputs: tuple[torch.dtype | None, ...]
) -> None:
    traced = Traced(
        lambda x, weight: aten.layer_norm(x, [4], weight, weight), floats(2, 4), floats(4)
    )
    flow = traced.flows({"layer_norm": Precision.LOW}, device=device)["layer_norm"]
    assert effect(flow) == (inputs, F16)


def test_kept_arguments_come_back_to_fp32_where_something_made_them_low() -> None:
    traced = Traced(
        lambda x, y: aten.layer_norm(x, [4], aten.mul(y, y), None), floats(2, 4), floats(4)
    )
    flows = traced.flows({"mul": Precision.LOW, "layer_norm": Precision.LOW})
    assert flows["layer_norm"].inputs == (F16, F32)


def test_group_normalisation_goes_with_layer_normalisation() -> None:
    for op in (aten.group_norm.default, aten.native_group_norm.default):
        assert facts_of_target(op).kept_arguments("cpu") == {"weight", "bias"}
        assert facts_of_target(op).kept_arguments("cuda") == frozenset()
    assert facts_of_target(aten.linear.default).kept_arguments("cpu") == frozenset()
    assert facts_of_target(fx.Graph.output_node).kept_arguments("cpu") == frozenset()
