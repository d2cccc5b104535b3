"""A captured graph called as the module it came from."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.export import export_graph
from amp_convert.capture.graph_call import GraphRunner, bind
from amp_convert.capture.graph_signature import Source
from amp_convert.core.errors import ModelError


class Scaled(nn.Module):
    """A parameter, a buffer that changes, a buffer that does not, a constant, nested inputs."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3)
        self.register_buffer("total", torch.zeros(3))
        self.constant = torch.tensor([1.0, 2.0, 3.0])

    def forward(
        self, x: torch.Tensor, extra: Any = None, *rest: torch.Tensor, power: int = 1, **more: Any
    ) -> dict[str, Any]:
        y = self.inner(x) * self.constant**power
        y = y + self.total
        self.total.add_(x.detach().sum(0))
        for value in (*(extra or {}).values(), *rest, *more.values()):
            y = y + value
        return {"y": y, "pair": (y.sum(), None)}


X = torch.arange(6.0).reshape(2, 3)


def runner(*args: Any, **kwargs: Any) -> tuple[GraphRunner, Scaled]:
    module = Scaled()
    graph = export_graph(module, args, kwargs, "eval")
    return GraphRunner(graph.graph_module, graph.signature, graph.constants, module), module


def test_it_returns_what_the_module_returns() -> None:
    run, module = runner(X)
    twin = Scaled()
    for _ in range(2):
        want, have = twin(X), run(X)
        assert list(have) == ["y", "pair"]
        assert torch.equal(have["y"], want["y"])
        assert have["pair"][1] is None
        assert torch.equal(module.total, twin.total)


def test_tensors_are_looked_up_at_every_call() -> None:
    run, module = runner(X)
    module.inner.weight = nn.Parameter(torch.zeros(3, 3))
    module.inner._parameters["bias"] = nn.Parameter(torch.ones(3))
    module.total = torch.full((3,), 10.0)
    assert torch.equal(run(X)["y"], torch.tensor([[11.0, 12.0, 13.0]]).expand(2, 3))
    assert torch.equal(module.total, torch.full((3,), 10.0) + X.sum(0))


def test_a_buffer_that_changes_may_be_needed_for_backward() -> None:
    """The graph reads a clone: else autograd would find the saved value overwritten."""

    class Momentum(nn.Module):
        mean: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("mean", torch.full((3,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.weight * self.mean * x
            self.mean.copy_(self.mean * 0.5)
            return y

    module = Momentum()
    graph = export_graph(module, (X,), {}, "train")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    run(X).sum().backward()
    assert torch.equal(module.mean, torch.ones(3))
    assert torch.equal(module.weight.grad, 2 * X.sum(0))


def test_a_changed_input_is_changed_for_the_caller() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x * self.weight

    module, given = Doubling(), X.clone()
    graph = export_graph(module, (X.clone(),), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    assert torch.equal(run(given), 2 * X)
    assert torch.equal(given, 2 * X)


def test_inputs_and_tensors_stand_in_the_graphs_order() -> None:
    run, module = runner(X)
    specs = run.signature.inputs
    assert [spec.source for spec in specs].count(Source.USER) == 1
    own = {
        "inner.weight": module.inner.weight,
        "inner.bias": module.inner.bias,
        "total": module.total,
        "constant": module.constant,
    }
    for spec, held, given in zip(specs, run.tensors(), run.inputs((X,), {}), strict=True):
        if spec.source is Source.USER:
            assert held is None
            assert given is X
        else:
            assert torch.equal(held, own[spec.target])
            assert (given is held) == (spec.target != "total"), "the buffer that changes is cloned"
    placeholders = run.graph_module.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(specs)


# --- the order of a call's leaves ----------------------------------------------------------------


@pytest.mark.slow
def test_every_way_to_spell_a_call() -> None:
    a, b, c = torch.full((3,), 1.0), torch.full((3,), 10.0), torch.full((3,), 100.0)
    run, _ = runner(X, {"a": a, "b": b}, power=2, late=c)
    want = Scaled()(X, {"a": a, "b": b}, power=2, late=c)["y"]
    spellings = [
        ((X, {"a": a, "b": b}), {"power": 2, "late": c}),
        ((X,), {"late": c, "power": 2, "extra": {"a": a, "b": b}}),
        ((), {"late": c, "extra": {"a": a, "b": b}, "x": X, "power": 2}),
    ]
    for args, kwargs in spellings:
        fresh, _ = runner(X, {"a": a, "b": b}, power=2, late=c)
        assert torch.equal(fresh(*args, **kwargs)["y"], want)
    with pytest.raises(ModelError, match="another structure"):
        run(X, {"a": a}, power=2, late=c)
    with pytest.raises(ModelError, match="another structure"):
        run(X, {"a": a, "b": b}, power=2, later=c)


def test_positional_extras() -> None:
    run, _ = runner(X, None, X.clone(), X.clone())
    assert torch.equal(run(X, None, X, X * 2)["y"], Scaled()(X, None, X, X * 2)["y"])
    with pytest.raises(ModelError, match="another structure"):
        run(X, None, X)


VALUES = {"int": 2, "float": 0.5, "bool": True, "none": None, "string": "mean"}


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, flag: Any = "default") -> torch.Tensor:
        y = x * self.weight
        if flag is None or flag == "mean":
            return y.mean()
        return y * flag


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_are_no_tensors_are_part_of_the_graph(kind: str) -> None:
    """They decided what was traced: another value needs another graph, and is refused."""
    value, module = VALUES[kind], Flagged()
    graph = export_graph(module, (X, value), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    assert torch.equal(run(X, value), module(X, value))
    others = {**VALUES, "another int": 3, "int as float": 2.0, "int as bool": False}
    for name, other in others.items():
        if name != kind:
            with pytest.raises(ModelError, match=f"input flag is {other!r}, but the graph was"):
                run(X, other)
    with pytest.raises(ModelError, match="input flag is 'default'"):
        run(X)


def test_equal_values_of_two_types_are_not_mixed_up() -> None:
    module = Flagged()
    graph = export_graph(module, (X, True), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    with pytest.raises(ModelError, match="input flag is 1, but the graph was captured with True"):
        run(X, 1)


def test_a_tensor_where_a_value_was_and_the_other_way_round() -> None:
    module = Flagged()
    graph = export_graph(module, (X, 2), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    with pytest.raises(ModelError, match="input flag is tensor"):
        run(X, torch.tensor(2))
    run, _ = runner(X)
    with pytest.raises(ModelError, match="another structure"):
        run([1.0, 2.0, 3.0])


def test_shapes_may_vary_in_the_first_dimension_only() -> None:
    run, _ = runner(X)
    assert run(torch.ones(5, 3))["y"].shape == (5, 3)
    for shape in ((2, 4), (3,), (2, 3, 1), ()):
        with pytest.raises(ModelError, match="input x has shape") as caught:
            run(torch.ones(shape))
        assert str(shape) in str(caught.value)
        assert "(any, 3)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_dtypes_may_not_vary(dtype: torch.dtype) -> None:
    run, _ = runner(X)
    with pytest.raises(ModelError, match=f"input x has dtype {dtype}"):
        run(X.to(dtype))


def test_bind_says_what_does_not_fit() -> None:
    signature = inspect.signature(Scaled().forward)
    assert bind(signature, (X,), {"power": 3}).arguments == {"x": X, "power": 3}
    with pytest.raises(ModelError, match="missing a required argument: 'x'") as caught:
        bind(signature, (), {})
    assert "tuple for positional inputs" in caught.value.mend
