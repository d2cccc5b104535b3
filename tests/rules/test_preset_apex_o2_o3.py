"""Apex's O2 and O3: the eager model, cast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.rules.apex_models import INPUTS, Classifier, as_float, build, run, staged
from tests.small_models import ramp
from tests.staged import F16, F32, Staged, decision, same_bits


def representable(tensor: torch.Tensor) -> torch.Tensor:
    """What FP16 can hold of it."""
    return tensor.half().float()


class Initialized(nn.Module):
    """The model as `amp.initialize` casts it in O2 and O3: inputs to FP16, outputs to FP32."""

    def __init__(self, model: nn.Module, *, keep_batchnorm_fp32: bool) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if not (keep_batchnorm_fp32 and is_batch_norm and module.affine):
                for tensor in (*module.parameters(False), *module.buffers(False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(F16)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return as_float(self.model(*(x.to(F16) for x in inputs)))


def o2(model: nn.Module) -> Initialized:
    return Initialized(copy.deepcopy(model), keep_batchnorm_fp32=True)


def o3(model: nn.Module) -> Initialized:
    return Initialized(copy.deepcopy(model), keep_batchnorm_fp32=False)


def assert_same_bits(
    preset: str, oracle: Callable[[nn.Module], Initialized], model: nn.Module, mode: str
) -> None:
    """Outputs and statistics agree; `model`, converted, is left with those that a call leaves."""
    inputs = INPUTS["cnn" if isinstance(model, Classifier) else "block"]
    original = run(copy.deepcopy(model).train(mode == "train"), inputs)
    cast = oracle(model).train(mode == "train")
    converted = Staged.of(model, *inputs).convert(preset).train(mode == "train")
    have = run(converted, inputs)
    assert same_bits(run(cast, inputs), have)
    assert not same_bits(original, have)
    statistics = {n: b.float() for n, b in model.named_buffers()}
    assert same_bits({n: b.float() for n, b in cast.model.named_buffers()}, statistics)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_o2_gives_the_bits_of_a_model_with_batch_norm_in_float32(mode: str) -> None:
    """On FP16 input the CPU's BatchNorm computes in FP32 from FP32 parameters, as cuDNN's does."""
    assert_same_bits("apex-o2", o2, build("cnn"), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("preset", "oracle"), [("apex-o2", o2), ("apex-o3", o3)])
def test_o2_and_o3_give_the_bits_of_a_half_block(
    preset: str, oracle: Callable[[nn.Module], Initialized], mode: str
) -> None:
    """The CPU's layer normalisation reads its weights in FP32: let FP16 be able to hold them."""
    assert_same_bits(preset, oracle, build("block", representable), mode)


@pytest.mark.slow
def test_o3_gives_the_bits_of_a_half_model() -> None:
    """A converted model's statistics stay FP32: let FP16 be able to hold them."""
    assert_same_bits("apex-o3", o3, build("cnn", representable), "eval")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_o3_treats_batch_norm_as_with_keep_batchnorm_fp32(mode: str) -> None:
    """A known difference: Apex's O3 rounds parameters and statistics unless told to keep them."""
    assert_same_bits("apex-o3", o2, build("cnn"), mode)
    assert {b.dtype for b in o3(build("cnn")).model.norm.parameters()} == {F16}


def test_o2_says_what_becomes_of_batch_norm() -> None:
    found = decision(staged("cnn").plan("apex-o2"), "norm/_native_batch_norm_legit_no_training#0")
    assert found.reason.startswith("O2 keeps BatchNorm's parameters and statistics in FP32")
    assert found.input_dtypes == (None,) * 5


class Transformed(nn.Module):
    """A linear, then an op that has no FP16 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(self.first(x) + 4 * torch.eye(4))


@pytest.mark.parametrize("preset", ["apex-o2", "apex-o3"])
def test_an_op_without_a_kernel_stays_float32(preset: str) -> None:
    torch.manual_seed(0)
    converted = Staged.of(Transformed(), ramp(4, 4)).convert(preset)
    found = {d.op: d for d in converted.plan.eval}
    assert found["aten.linear"].low
    inverse = found["aten.linalg_inv"]
    assert (inverse.rule, inverse.category, inverse.low) == ("no kernel", "deny", False)
    assert run(converted, (ramp(4, 4),)).dtype == F32
