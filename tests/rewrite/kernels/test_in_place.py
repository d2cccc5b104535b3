"""Writes in place: where they may be, where not, and the same bits wherever they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amp_convert as amp
from tests.rewrite.kernels.running import running, targets
from tests.zoo import assert_same_bits

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


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_STEPS)), st.integers(0, 8), st.integers(0, 8)),
        min_size=1,
        max_size=8,
    )
)
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
