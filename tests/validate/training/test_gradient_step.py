"""One training step: gradients against plain eager PyTorch, and nothing left behind."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.capture.gradient_probe import GradientProbe
from amp_convert.core.errors import AmpConvertError, ModelError, UnsupportedModelError
from amp_convert.validate.training.gradient_step import StepTrace, TrainStep
from tests.staged import Staged
from tests.zoo import assert_same_bits, converted, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)
Y = torch.linspace(1, -1, 24).reshape(6, 4)


REAL = [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("cnn", "gpt2")]


def squares(outputs: Any, target: Any) -> torch.Tensor:
    """A loss for any model: every output has a part in it."""
    leaves = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())
    return sum(
        ((t - 0.1) ** 2).mean() for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad
    )  # type: ignore[return-value]


class Net(nn.Module):
    """BatchNorm, dropout, a view that is read twice, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.first(x)).view(-1, 2, 4)
        h = F.gelu(h).reshape(-1, 8)
        return self.last(self.drop(h)) * self.frozen


@functools.cache
def shared() -> Staged:
    """For tests that change nothing in it."""
    return staged()


def staged(model: Callable[[], nn.Module] = Net, *args: Any) -> Staged:
    torch.manual_seed(0)
    return Staged.of(model(), *(args or (X,)))


def step(
    of: Staged, loss: Any = F.mse_loss, args: Any = None, target: Any = Y, path: str = "net.py"
) -> TrainStep:
    return TrainStep(of.convert("fp32"), (args or of.args, {}, target), loss, path)


def by_hand(
    model: nn.Module, loss: Callable[[Any], torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Gradients by parameter from a plain eager backward pass on a copy of the model."""
    model = copy.deepcopy(model).train()
    with torch.random.fork_rng():
        value = loss(model(*args, **kwargs))
        value.backward()
    return float(value.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def both(given: TrainStep, of: Staged) -> list[StepTrace]:
    return [given.eager(), given.run(GradientProbe(of.captured), "FP32")]


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


# --- errors --------------------------------------------------------------------------------------


def _nan_gradient(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out * 0).abs().sqrt().sum()


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


class Branching(nn.Module):
    """A branch on values between two parts, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        if y.sum() > 1e9:
            y = -y
        return self.last(self.middle(self.middle(y))) * self.scale


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
