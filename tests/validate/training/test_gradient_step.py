"""One training step: gradients against plain eager PyTorch, and nothing left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.core.errors import ModelError
from amp_convert.validate.training.gradient_step import TrainStep
from tests.bits import assert_same_bits
from tests.validate.training.gradient_steps import both, by_hand, shared, staged, step
from tests.zoo import converted, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)


Y = torch.linspace(1, -1, 24).reshape(6, 4)


REAL = [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("cnn", "gpt2")]


def squares(outputs: Any, target: Any) -> torch.Tensor:
    """A loss for any model: every output has a part in it."""
    leaves = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())
    return sum(
        ((t - 0.1) ** 2).mean() for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad
    )  # type: ignore[return-value]


def test_gradients_are_those_of_plain_pytorch() -> None:
    of = shared()
    torch.manual_seed(3)
    traces = both(step(of), of)
    torch.manual_seed(3)
    value, wanted = by_hand(of.model, lambda out: F.mse_loss(out, Y), X)
    assert wanted["unused"] is None
    assert "frozen" not in wanted
    for trace in traces:
        assert trace.loss == value
        assert_same_bits(wanted, trace.gradients)
    assert traces[0].rng_state.same(traces[1].rng_state)


@pytest.mark.parametrize("name", REAL)
def test_gradients_of_real_models(name: str) -> None:
    model, args, kwargs = example(name)
    mixed = converted(name)
    with mode(model):
        value, wanted = by_hand(model, lambda out: squares(out, None), *args, **kwargs)
        given = TrainStep(mixed, (args, kwargs, None), squares, "")
        for trace in (given.eager(), given.run(GradientProbe(mixed.captured), "FP32")):
            assert trace.loss == value
            assert_same_bits(wanted, trace.gradients)


# --- nothing is left behind ----------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_as_it_was() -> None:
    of = staged()
    model, mixed = of.model, of.convert()
    model.train()
    model.get_submodule("norm").eval()
    mixed.training = False
    model.get_parameter("first.weight").grad = torch.full((8, 4), 3.0)
    x, y = X.clone(), Y.clone()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()

    def loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target.mul_(2)
        return F.mse_loss(outputs, target)

    given = TrainStep(mixed, ((x,), {}, y), loss, "")
    traces = [
        given.eager(),
        given.run(GradientProbe(of.captured), "FP32"),
        given.run(mixed, "mixed", 8.0),
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits(buffers, dict(model.named_buffers()))
    assert_same_bits(weights, {n: p.detach() for n, p in model.named_parameters()})
    assert flags == [m.training for m in model.modules()]
    assert mixed.training is False
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_bits(grads, {"first.weight": torch.full((8, 4), 3.0)})
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert all(torch.equal(state, t.rng_state.cpu) is False for t in traces)  # dropout did draw


def test_everything_is_as_it_was_after_an_error() -> None:
    of = staged()
    of.model.eval()
    buffers = {name: buffer.clone() for name, buffer in of.model.named_buffers()}
    with pytest.raises(ModelError):
        step(of, lambda out, t: out.sum() * math.nan).eager()
    assert_same_bits(buffers, dict(of.model.named_buffers()))
    assert not any(m.training for m in of.model.modules())


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(outer: Any) -> None:
    of = shared()
    torch.manual_seed(3)
    (want, _) = both(step(of), of)
    torch.manual_seed(3)
    with outer():
        traces = both(step(of, args=(X.clone(),), target=Y.clone()), of)
    for have in traces:
        assert_same_bits(want.gradients, have.gradients)
