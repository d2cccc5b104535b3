"""The scale of a gradient step, what it refuses, and models in parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.core.errors import AmpConvertError, ModelError, UnsupportedModelError
from amp_convert.validate.training.gradient_step import TrainStep
from tests.bits import assert_same_bits
from tests.validate.training.gradient_steps import Branching, both, by_hand, shared, staged, step

X = torch.linspace(-1, 1, 24).reshape(6, 4)


Y = torch.linspace(1, -1, 24).reshape(6, 4)


# --- scale ---------------------------------------------------------------------------------------


def test_the_scale_multiplies_gradients_and_not_the_loss() -> None:
    of = shared()
    given = step(of)
    torch.manual_seed(3)
    plain, scaled = given.run(of.model, "mixed"), given.run(of.model, "mixed", 2.0**10)
    assert scaled.loss == plain.loss
    for name, gradient in plain.gradients.items():
        have = scaled.gradients[name]
        if gradient is None or have is None:
            assert gradient is have
        else:
            assert torch.equal(gradient * 2**10, have), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loss_of_another_dtype(dtype: torch.dtype) -> None:
    of = shared()
    given = step(of, lambda out, t: F.mse_loss(out, t).to(dtype))
    plain, scaled = given.run(of.model, "mixed"), given.run(of.model, "mixed", 2.0**20)
    assert plain.loss == scaled.loss
    # In training, too, a loss in FP16 has a gradient in FP16, the scale, and 2**20 is none there.
    finite = [bool(g.isfinite().all()) for g in scaled.gradients.values() if g is not None]
    assert all(finite) == (dtype != torch.float16)


def _nan_gradient(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out * 0).abs().sqrt().sum()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, t: 0.5, "loss() gives a float, not a tensor (at net.py)"),
        (lambda out, t: out, "loss() gives a tensor of shape (6, 4)"),
        (lambda out, t: (out > 0).sum(), "loss() gives a tensor of torch.int64"),
        (lambda out, t: F.mse_loss(out.detach(), t), "a tensor that no parameter has a gradient"),
        (lambda out, t: out.sum() * math.nan, "the FP32 model itself has a loss of nan"),
        (lambda out, t: out.sum() / 0, "the FP32 model itself has a loss of "),
        (_nan_gradient, "the FP32 model itself has NaN or infinite gradients: 32 of 32 in first.w"),
        (
            lambda out, t: F.mse_loss(out, t.reshape(4, 6)),
            "loss(), given the outputs of the FP32 model, raised RuntimeError: The size of tensor",
        ),
        (lambda out, t: out[9], "loss(), given the outputs of the FP32 model, raised IndexError"),
    ],
)
def test_what_a_loss_may_not_be(loss: Any, message: str) -> None:
    of = shared()
    with pytest.raises(ModelError) as caught:
        step(of, loss).eager()
    assert message in str(caught.value)
    assert caught.value.mend


def test_a_loss_of_shape_one_is_a_loss() -> None:
    of = shared()
    torch.manual_seed(3)
    (want, _) = both(step(of), of)
    torch.manual_seed(3)
    (have, _) = both(step(of, lambda out, t: F.mse_loss(out, t)[None]), of)
    assert_same_bits(want.gradients, have.gradients)


def test_a_batch_that_does_not_fit() -> None:
    of = shared()
    with pytest.raises(ModelError, match=r"input x has shape \(6, 5\)"):
        step(of, args=(torch.ones(6, 5),)).eager()
    with pytest.raises(ModelError, match="raised RuntimeError: The size of tensor"):
        step(of, lambda out, t: (out - t).mean(), args=(torch.ones(5, 4),)).eager()


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


@pytest.mark.slow
def test_values_that_the_model_refuses() -> None:
    of = staged(Ids, torch.tensor([1, 2]))
    with pytest.raises(ModelError, match="a training step of the FP32 model raised IndexError"):
        step(of, args=(torch.tensor([1, 7]),), target=torch.ones(2, 4)).eager()


def test_sparse_gradients_are_compared_as_dense_ones() -> None:
    of = staged(Ids, torch.tensor([1, 2]))
    trace = step(of, target=torch.ones(2, 4)).eager()
    gradient = trace.gradients["embed.weight"]
    assert gradient is not None
    assert gradient.layout == torch.strided
    assert gradient.any(1).tolist() == [False, True, True, False, False]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.view(-1, 2, 2)) * self.turn)


@pytest.mark.slow
def test_complex_gradients_are_compared_part_by_part() -> None:
    of = staged(Complex)
    watched = GradientProbe(of.captured)
    trace = step(of, target=Y.view(-1, 2, 2)).run(watched, "FP32")
    _, wanted = by_hand(of.model, lambda out: F.mse_loss(out, Y.view(-1, 2, 2)), X)
    assert_same_bits({"turn": torch.view_as_real(wanted["turn"])}, trace.gradients)
    assert [seen.elements for _, seen in watched.seen.values()] == [24]


def test_a_model_without_trainable_parameters() -> None:
    of = staged()
    mixed = of.convert("fp32")
    of.model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of the model requires gradients"):
        TrainStep(mixed, ((X,), {}, Y), F.mse_loss, "")


class EvalOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y * 2 if self.training and y.sum() > 0 else y


def test_a_model_without_a_train_graph() -> None:
    of = staged(EvalOnly)
    with pytest.raises(UnsupportedModelError, match="captured for inference only"):
        step(of).eager()


def test_errors_are_of_the_one_hierarchy() -> None:
    assert issubclass(ModelError, AmpConvertError)


# --- models captured in parts --------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_parts() -> None:
    of = staged(Branching)
    assert not of.captured.is_whole
    watched = GradientProbe(of.captured)
    given = step(of)
    value, wanted = by_hand(of.model, lambda out: F.mse_loss(out, Y), X)
    for trace in (given.eager(), given.run(watched, "FP32")):
        assert trace.loss == value
        assert_same_bits(wanted, trace.gradients)
    elements = {info.identity: seen.elements for info, seen in watched.seen.values()}
    assert elements == {
        "first/aten.linear#0": 48,
        "middle/aten.linear#0": 96,  # both calls
        "last/aten.linear#0": 24,
    }
    assert not any("forward" in vars(m) for m in of.model.modules())
