"""Writes in place: where they may be, where not, and the same bits wherever they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amp_convert as amp
from tests.bits import assert_same_bits
from tests.rewrite.kernels.running import running, targets

aten = torch.ops.aten


class Net(nn.Module):
    """A linear layer, and what comes after it."""

    def __init__(self, after: Callable[..., object]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self._after = after

    def forward(self, x: torch.Tensor) -> object:
        return self._after(self.linear(x), x)


def _squared(value: torch.Tensor) -> torch.Tensor:
    return value * value


CASES = {
    "a value that nobody else reads": (lambda y, x: torch.relu(y) * 2, ["relu_", "mul_"]),
    "a value that is read again": (lambda y, x: torch.relu(y) + y, ["relu", "add_"]),
    "an input": (lambda y, x: (torch.tanh(x), y), ["tanh"]),
    "a view": (lambda y, x: torch.relu(y.reshape(-1)) * 2, ["relu", "mul_"]),
    "what has a view": (lambda y, x: (y[0], torch.sigmoid(y)), ["sigmoid"]),
    "a value that is returned": (lambda y, x: (y, torch.exp(y)), ["exp"]),
    "the second of two": (lambda y, x: x + torch.exp(y), ["exp_", "add_"]),
    "the second of a difference": (lambda y, x: x - torch.exp(y), ["exp_", "sub"]),
    "a smaller value": (lambda y, x: y[:, :1].abs() + x, ["abs", "add"]),
    "one that is read twice at once": (lambda y, x: _squared(torch.exp(y)), ["exp_", "mul"]),
    "another dtype": (lambda y, x: torch.exp(y) > 0, ["exp_", "gt"]),
    "a sum that is scaled": (lambda y, x: torch.add(x, torch.exp(y), alpha=2), ["exp_", "add"]),
}


@pytest.mark.parametrize("what", CASES)
def test_where_it_writes(what: str) -> None:
    after, expected = CASES[what]
    torch.manual_seed(0)
    model, x = Net(after).eval(), torch.randn(3, 6)
    mixed = amp.convert(model, x, rules="fp32", train=False)
    before = x.clone()
    with torch.no_grad():
        assert_same_bits(model(x), mixed(x))
    assert torch.equal(x, before)
    named = [name for name in targets(running(mixed).tuned) if name.rstrip("_") in _names(expected)]
    assert sorted(named) == sorted(expected)


def _names(expected: list[str]) -> set[str]:
    return {name.rstrip("_") for name in expected}


def test_weights_and_constants_stay() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(self.weight) * torch.relu(self.scale) + x

    model, x = Weights().eval(), torch.randn(4)
    for call in (mixed := amp.convert(model, x, train=False), mixed.freeze()):
        with torch.no_grad():
            first = call(x)
            assert_same_bits(first, call(x))


def test_gradients_are_those_of_the_graph_as_it_was() -> None:
    torch.manual_seed(0)
    model = Net(lambda y, x: torch.exp(torch.sigmoid(y)) * 2).eval()
    x = torch.randn(3, 6, requires_grad=True)
    mixed = amp.convert(model, x.detach(), rules="fp32", train=False)
    [want] = torch.autograd.grad(model(x).sum(), x)
    [have] = torch.autograd.grad(mixed(x).sum(), x)
    assert_same_bits(want, have)
    assert not any(name.endswith("_") for name in targets(running(mixed).plain))


def _softmax(value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(value, -1)


TRAINED = {
    "over what a product made": (lambda y, x: torch.relu(y), ["relu_"]),
    "over what a sum made": (lambda y, x: torch.relu(y + x), ["add_", "relu_"]),
    "a scale": (lambda y, x: y * 0.5 + x, ["mul_", "add_"]),
    "over what made it and saved it": (lambda y, x: torch.relu(y) + x, ["relu_", "add"]),
    "what it needs itself": (lambda y, x: torch.exp(y * x), ["mul", "exp"]),
    "over what softmax saved": (lambda y, x: _softmax(y) + x, ["add"]),
    "over a view": (lambda y, x: torch.relu(y.view(2, 9)), ["relu"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAINED)
def test_where_it_writes_in_training(what: str) -> None:
    after, expected = TRAINED[what]
    torch.manual_seed(0)
    model, x = Net(after).train(), torch.randn(3, 6)
    mixed = amp.convert(model, x, rules="fp32")
    assert_same_bits(_step(model, x), _step(mixed, x))
    named = [
        name
        for name in targets(running(mixed, "train").tuned)
        if name.rstrip("_") in _names([*expected, "add", "mul", "relu", "exp"])
    ]
    assert named == expected


def _step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs, and the gradients of the input and of the weights."""
    x = x.clone().requires_grad_()
    made = model(x)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.requires_grad]
    wanted = [x, *model.parameters()]
    loss = sum((t * torch.linspace(-1, 2, t.numel()).view_as(t)).sum() for t in outputs)
    if not isinstance(loss, torch.Tensor):
        return list(made)
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(t.detach() for t in outputs), *(g for g in found if g is not None)]


@pytest.mark.slow
def test_a_view_that_a_layer_makes_is_not_written_to_in_training() -> None:
    """`linear` gives a view for inputs of three dimensions; autograd would copy in the backward
    pass for a write over it."""
    model, x = Net(lambda y, x: torch.relu(y)).train(), torch.randn(2, 3, 6)
    mixed = amp.convert(model, x, rules="fp32")
    assert "relu" in targets(running(mixed, "train").tuned)
    assert_same_bits(_step(model, x), _step(mixed, x))


_STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relu": lambda a, b: torch.relu(a),
    "exp": lambda a, b: torch.exp(a.clamp(-3, 3)),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "view": lambda a, b: a.t().t(),
    "flip": lambda a, b: a.transpose(0, 1).reshape(a.shape),
    "fill": lambda a, b: a.masked_fill(b > 0, 0.5),
    "write": lambda a, b: a.index_put((torch.tensor([0, 1]),), b[:2]),
    "tanh": lambda a, b: torch.tanh(a),
    "scale": lambda a, b: a * 0.5,
    "gelu": lambda a, b: torch.nn.functional.gelu(a),
    "norm": lambda a, b: torch.nn.functional.layer_norm(a, (4,)),
    "product": lambda a, b: a @ b,
}


class Chain(nn.Module):
    """Steps that each read two of the values before them."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._steps = steps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x, self.linear(x)]
        for name, one, two in self._steps:
            values.append(_STEPS[name](values[one % len(values)], values[two % len(values)]))
        return values[-1], values[len(values) // 2]


chains = given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_STEPS)), st.integers(0, 8), st.integers(0, 8)),
        min_size=1,
        max_size=8,
    )
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@chains
def test_any_chain_gives_the_same_bits(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Chain(steps).eval(), torch.randn(4, 4)
    mixed = amp.convert(model, x, rules="fp32", train=False)
    given = x.clone()
    with torch.no_grad():
        want = model(x)
        assert_same_bits(want, mixed(given))
        assert_same_bits(want, mixed(given))
    assert_same_bits(x, given)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@chains
def test_any_chain_has_the_same_gradients(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Chain(steps).train(), torch.randn(4, 4)
    mixed = amp.convert(model, x, rules="fp32")
    for _ in range(2):
        assert_same_bits(_step(model, x), _step(mixed, x))
