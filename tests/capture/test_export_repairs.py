"""Repairs of exported graphs: they fit for conversion, and compute what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.exports import calls, graph_of, targets

aten = torch.ops.aten


# --- repair 1: explicit casts --------------------------------------------------------------------

NO_OPS = {
    "float": lambda m, x: m.linear(x).float(),
    "to dtype": lambda m, x: m.linear(x).to(torch.float32),
    "to keyword": lambda m, x: m.linear(x).to(dtype=torch.float32),
    "to device and dtype": lambda m, x: m.linear(x).to("cpu", torch.float32),
    "to other": lambda m, x: m.linear(x).to(x),
    "to non-blocking": lambda m, x: m.linear(x).to(torch.float32, non_blocking=True),
    "type_as": lambda m, x: m.linear(x).type_as(x),
    "to own dtype": lambda m, x: m.linear(x).to(x.dtype),
}


@pytest.mark.parametrize("form", NO_OPS)
def test_a_cast_that_does_nothing_in_fp32_is_kept(form: str) -> None:
    graph, have, want = graph_of(NO_OPS[form])
    assert torch.equal(have, want)
    node = calls(graph)[-1]
    assert node.target is aten.to.dtype
    assert node.args[1] is torch.float32
    assert graph.nodes[node.name].op == "aten.to.dtype"


def test_a_cast_that_copies_stays_a_copy() -> None:
    graph, have, want = graph_of(lambda m, x: m.linear(x).to(torch.float32, copy=True))
    assert torch.equal(have, want)
    node = calls(graph)[-1]
    assert (node.target, dict(node.kwargs)) == (aten._to_copy.default, {"dtype": torch.float32})


def test_a_kept_cast_acts_on_low_values_and_passes_gradients() -> None:
    graph, _, _ = graph_of(lambda m, x: m.linear(x).float() * 2)
    node = next(n for n in calls(graph) if n.target is aten.to.dtype)
    low = torch.ones(3, dtype=torch.float16, requires_grad=True)
    up = node.target(low, *node.args[1:], **node.kwargs)
    up.sum().backward()
    assert up.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.float16


def test_a_region_that_the_model_itself_computes_low_stays() -> None:
    graph, have, want = graph_of(lambda m, x: m.linear(x).half().exp().float())
    assert torch.equal(have, want)
    casts = [n.kwargs["dtype"] for n in calls(graph) if n.target is aten._to_copy.default]
    assert casts == [torch.float16, torch.float32]


# --- repairs 2 to 4 ------------------------------------------------------------------------------


def test_views_take_any_strides() -> None:
    graph, have, want = graph_of(lambda m, x: m.linear(x).view(-1, 2).t().contiguous().view(-1))
    assert torch.equal(have, want)
    assert aten.view.default not in targets(graph)
    assert targets(graph).count(aten.reshape.default) == 2


def test_no_check_of_traced_dtypes_remains() -> None:
    graph, have, want = graph_of(lambda m, x: m.linear(x).half() + x.to(torch.float16))
    assert torch.equal(have, want)
    assert not any("assert" in str(target) for target in targets(graph))


@pytest.mark.slow
@pytest.mark.parametrize(
    "drop",
    [nn.functional.dropout, nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout],
)
def test_inactive_dropout_leaves_nothing_behind(drop: Callable[..., torch.Tensor]) -> None:
    def function(module: Any, x: torch.Tensor) -> torch.Tensor:
        return drop(module.linear(x), 0.5, module.training)

    graph, have, want = graph_of(function)
    assert torch.equal(have, want)
    assert targets(graph) == [aten.linear.default]
    active, _, _ = graph_of(function, "train")
    assert len(targets(active)) > 1


def test_an_explicit_clone_stays() -> None:
    """Only dropout's copy goes: a user may write to their clone's source."""
    graph, have, want = graph_of(lambda m, x: m.linear(x).clone())
    assert torch.equal(have, want)
    assert aten.clone.default in targets(graph)
