"""`torch.cond` as part of the graph around it: both branches, and a choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amp_convert.capture import fidelity
from amp_convert.capture.captured import Captured
from amp_convert.capture.regions import capture
from amp_convert.core.mode import Mode

X = torch.linspace(-1, 1, 32).reshape(4, 8) + 0.25
"""Its sum is positive, that of its negative is not."""


class Branching(nn.Module):
    """Three layers and a function of them; a positive sum of inputs is what it decides by."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other = (nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def plain(m: Any, x: Tensor) -> Any:
    h = m.first(x)
    return torch.cond(x.sum() > 0, lambda v: m.one(v).tanh(), lambda v: m.other(v).relu(), (h,))


def several_results(m: Any, x: Tensor) -> Any:
    h = m.first(x)
    one, two = torch.cond(
        x.sum() > 0, lambda v: (m.one(v), v + 1), lambda v: (m.other(v) * 2, v.exp()), (h,)
    )
    return one + two, two


def nested(m: Any, x: Tensor) -> Any:
    def inner(v: Tensor) -> Any:
        return torch.cond(v.sum() > 1, lambda w: m.one(w).tanh(), lambda w: m.other(w), (v,))

    return torch.cond(x.sum() > 0, inner, lambda v: v * 2, (m.first(x),))


def shared_layer(m: Any, x: Tensor) -> Any:
    h = torch.cond(x.sum() > 0, lambda v: m.one(v), lambda v: m.one(v) * 2, (m.first(x),))
    return torch.cond(x.mean() > 1, lambda v: m.other(v), lambda v: m.one(v), (h,))


def computed_before(m: Any, x: Tensor) -> Any:
    """One branch alone reads `skip`, which eager computes whichever is taken."""
    skip, h = x * 2, m.first(x)
    return torch.cond(h.sum() > 0, lambda a, b: m.one(a) + b, lambda a, b: m.other(a), (h, skip))


def chained(m: Any, x: Tensor) -> Any:
    """One of two results goes into one branch of another condition."""
    h, late = m.first(x), x[0, 0] > 0
    a, b = torch.cond(x.sum() > 0, lambda v: (m.one(v), v * 2), lambda v: (m.other(v), v * 3), (h,))
    return torch.cond(late, lambda p, q: p + 1, lambda p, q: q * 2, (a, x)) + b


def without_derivative(m: Any, x: Tensor) -> Any:
    """A branch reads what it is given, and no gradient gets there."""
    return torch.cond(x.sum() > 0, lambda v: m.one(v), torch.zeros_like, (m.first(x),))


def of_a_tuple(m: Any, x: Tensor) -> Any:
    h, _ = m.first(x).max(-1, keepdim=True)
    return torch.cond(x.sum() > 0, lambda a, b: a * b, lambda a, b: m.other(b), (h, x))


def guarded(m: Any, x: Tensor) -> Any:
    """The usual reason for a condition: one branch has no gradient at the other's values."""
    return torch.cond(
        x.sum() > 0, lambda v: m.one(v.abs().sqrt() + v), lambda v: m.other(v) + (v - v).sqrt() * 0,
        (m.first(x).abs(),),
    )  # fmt: skip


def two_dtypes(m: Any, x: Tensor) -> Any:
    """Under autocast one branch gives a low result, the other does not."""
    return torch.cond(x.sum() > 0, lambda v: m.one(v), lambda v: v * 2, (m.first(x) * 0 + x,))


FUNCTIONS = [
    plain,
    several_results,
    nested,
    shared_layer,
    computed_before,
    chained,
    without_derivative,
    of_a_tuple,
    guarded,
    two_dtypes,
]


def targets(captured: Captured, mode: Mode = Mode.EVAL) -> list[Any]:
    graph = captured.regions[0].graphs[mode].graph_module.graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graph_of_both_branches_is_the_eager_model(function: Callable[..., Any]) -> None:
    """Outputs and gradients, bit for bit, whichever branch is taken; eager gives zeros for the
    parameters of the other."""
    model = Branching(function)
    captured = capture(model, (X,), {})
    others = [fidelity.check(model, captured.regions[0].runner(m), (-X,), {}, m) for m in Mode]
    for found in (*captured.fidelity, *others):
        assert found.status == "identical"
        assert found.gradients
    for mode in Mode:
        called = targets(captured, mode)
        assert torch.ops.higher_order.cond not in called
        assert torch.ops.aten.where.self in called


@pytest.mark.slow
def test_an_operator_of_a_branch_has_the_layer_whose_weights_it_reads_and_the_users_line() -> None:
    nodes = capture(Branching(plain), (X,), {}).regions[0].graphs[Mode.EVAL].nodes
    linear = [n for n in nodes.values() if n.short_op == "aten.linear"]
    assert [n.layer for n in linear] == ["first", "one", "other"]
    assert [n.modules[0] for n in linear] == ["torch.nn.modules.linear.Linear"] * 3
    assert all("test_branches.py" in n.location for n in nodes.values())
    assert len({n.identity for n in nodes.values()}) == len(nodes)


def drawing(m: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: m.dropout(v), lambda v: v * 2, (m.first(x),))


@pytest.mark.slow
def test_a_branch_that_draws_is_left_alone_where_it_draws() -> None:
    captured = capture(Branching(drawing), (X,), {})
    assert torch.ops.higher_order.cond not in targets(captured)
    assert torch.ops.higher_order.cond in targets(captured, Mode.TRAIN)
    assert [f.status for f in captured.fidelity] == ["identical", "identical"]


def refusing(m: Any, x: Tensor) -> Any:
    """A branch that raises on the values of the other."""
    return torch.cond(
        x.diagonal().min() > 0,
        lambda v: m.one(torch.linalg.cholesky(v)),
        lambda v: m.other(v),
        (x,),
    )


SQUARE = torch.eye(8) * 2 + 0.1


@pytest.mark.slow
def test_a_branch_that_raises_on_the_others_values() -> None:
    """Where that is so of the example, nobody knows the shapes in it, and it is left alone."""
    model = Branching(refusing)
    captured = capture(model, (SQUARE,), {})
    assert torch.ops.higher_order.cond not in targets(captured)
    for x in (SQUARE, -SQUARE):
        assert torch.equal(captured.regions[0].runner(Mode.EVAL)(x), model(x))
    captured = capture(model, (-SQUARE,), {})
    assert torch.ops.higher_order.cond in targets(captured)
    assert captured.fidelity[0].status == "identical"


def drawing_around(m: Any, x: Tensor) -> Any:
    def inner(v: Tensor) -> Any:
        return torch.cond(v.min() > 0, lambda w: m.one(w.sqrt()), lambda w: m.other(w), (v,))

    return torch.cond(
        x.sum() > -1e6,
        lambda v: nn.functional.dropout(inner(v), 0.5, m.training),
        lambda v: m.first(v),
        (x,),
    )


@pytest.mark.slow
def test_a_condition_within_a_branch_that_is_left_alone_is_left_alone() -> None:
    captured = capture(Branching(drawing_around), (X,), {})
    model, positive = captured.model, X.abs() + 0.1
    assert torch.ops.higher_order.cond in targets(captured, Mode.TRAIN)
    found = fidelity.check(
        model, captured.regions[0].runner(Mode.TRAIN), (positive,), {}, Mode.TRAIN
    )
    assert found.status == "identical"
