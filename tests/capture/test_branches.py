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


FUNCTIONS = [plain, several_results, nested, shared_layer]


def targets(captured: Captured, mode: Mode = Mode.EVAL) -> list[Any]:
    graph = captured.regions[0].graphs[mode].graph_module.graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


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


def test_an_operator_of_a_branch_has_the_layer_whose_weights_it_reads_and_the_users_line() -> None:
    nodes = capture(Branching(plain), (X,), {}).regions[0].graphs[Mode.EVAL].nodes
    linear = [n for n in nodes.values() if n.short_op == "aten.linear"]
    assert [n.layer for n in linear] == ["first", "one", "other"]
    assert [n.modules[0] for n in linear] == ["torch.nn.modules.linear.Linear"] * 3
    assert all("test_branches.py" in n.location for n in nodes.values())
    assert len({n.identity for n in nodes.values()}) == len(nodes)


def drawing(m: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: m.dropout(v), lambda v: v * 2, (m.first(x),))


def test_a_branch_that_draws_is_left_alone_where_it_draws() -> None:
    captured = capture(Branching(drawing), (X,), {})
    assert torch.ops.higher_order.cond not in targets(captured)
    assert torch.ops.higher_order.cond in targets(captured, Mode.TRAIN)
    assert [f.status for f in captured.fidelity] == ["identical", "identical"]


def undefined(m: Any, x: Tensor) -> Any:
    """The branch that is not taken has no gradient at these values: 0 times infinity."""
    return torch.cond(
        x.sum() > 0, lambda v: v * 2, lambda v: (v - v).sqrt() + m.other(v), (m.first(x),)
    )


def integers(m: Any, x: Tensor) -> Any:
    """PyTorch cannot differentiate this one."""
    return torch.cond(
        x.sum() > 0, lambda v: (v * 2, v.argmax(-1)), lambda v: (-v, v.argmin(-1)), (m.first(x),)
    )


def test_a_condition_without_gradients_is_judged_without_them() -> None:
    captured = capture(Branching(integers), (X,), {})
    assert [f.status for f in captured.fidelity] == ["identical", "identical"]
    assert [f.gradients for f in captured.fidelity] == [None, None]
    assert torch.ops.aten.where.self in targets(captured)


def given_back(m: Any, x: Tensor) -> Any:
    """A branch may not give what it is given: PyTorch traces none of it."""
    return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v, (m.first(x),))


def test_a_condition_that_cannot_be_traced_still_runs_after_its_parts_were_captured() -> None:
    """PyTorch compiles it where it runs, and refuses to for ever after it was watched once."""
    model = Branching(given_back)
    captured = capture(model, (X,), {})
    assert [region.path for region in captured.regions] == ["first"]
    assert captured.has_branches
    with torch.no_grad():
        assert torch.equal(model(X), model.first(X) * 2)


def test_a_branch_that_spoils_the_others_gradients_is_left_alone() -> None:
    captured = capture(Branching(undefined), (X,), {})
    assert [f.status for f in captured.fidelity] == ["identical", "identical"]
    assert all(f.gradients for f in captured.fidelity)
    for mode in Mode:
        assert torch.ops.higher_order.cond in targets(captured, mode)


def refusing(m: Any, x: Tensor) -> Any:
    """The branch that is not taken raises for these values."""
    return torch.cond(
        x.sum() > 0,
        lambda v: v * 2,
        lambda v: torch.linalg.cholesky(-torch.eye(8)) @ m.other(v).T.contiguous() @ v,
        (m.first(x),),
    )


def test_a_branch_that_raises_on_the_others_values_is_left_alone() -> None:
    captured = capture(Branching(refusing), (torch.eye(8),), {})
    assert torch.ops.higher_order.cond in targets(captured)
    assert captured.fidelity[0].status == "identical"
