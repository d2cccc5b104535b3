"""One module in one mode as a functional graph, and its signature."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.export import export_graph
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.capture.graph_signature import InputSpec, Source, UserInput
from amp_convert.core.errors import ModelError
from tests.exports import Function, X, calls, graph_of, targets
from tests.zoo import captured, every_model

aten = torch.ops.aten


# --- functional form -----------------------------------------------------------------------------


@every_model
def test_no_operator_changes_its_input(name: str) -> None:
    for graph in captured(name).regions[0].graphs.values():
        for node in calls(graph):
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable, node.target


def test_in_place_operators_become_functional() -> None:
    def function(module: Any, x: torch.Tensor) -> torch.Tensor:
        y = module.linear(x)
        y.relu_()
        y += 1
        y[:, 0] = 0
        return y

    graph, have, want = graph_of(function)
    assert torch.equal(have, want)
    assert {aten.relu.default, aten.add.Tensor} <= set(targets(graph))


def written_into(module: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], 4)
    y[:, :2] = module.linear(x)[:, 2:]
    y[:, 2:] = module.linear.bias[:2]
    y[0] = x[0, 1]
    return y


def test_a_result_that_is_written_in_parts_has_gradients() -> None:
    """Its functional form is aten.copy, which PyTorch cannot differentiate."""
    module = Function(written_into)
    graph = export_graph(module, (X,), {}, "train")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    want, have = module(X), run(X)
    assert torch.equal(want, have)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(want.square().sum(), parameters),
        torch.autograd.grad(have.square().sum(), parameters),
        strict=True,
    ):
        assert torch.equal(a, b)


WHOLE = {
    "cnn": {"aten.conv2d", "aten.linear"},
    "lstm": {"aten.lstm", "aten.embedding"},
    "transformer": {"aten.scaled_dot_product_attention", "aten.layer_norm"},
    "bert": {"aten.scaled_dot_product_attention", "aten.layer_norm", "aten.gelu"},
    "llama": {"aten.silu"},
    "t5": {"aten.scaled_dot_product_attention"},
    "mixtral": {"aten.softmax"},
    "mamba": {"aten.conv1d", "aten.silu"},
}


@every_model
def test_composite_operators_stay_whole(name: str) -> None:
    found = {n.short_op for n in captured(name).regions[0].graphs["eval"].nodes.values()}
    assert WHOLE.get(name, set()) <= found
    assert not found & {"aten.native_layer_norm", "aten._softmax", "aten.convolution"}


# --- signature -----------------------------------------------------------------------------------


class Everything(nn.Module):
    """Each kind of input that a graph can have."""

    running: torch.Tensor
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.constant = torch.full((4,), 2.0)
        self.register_buffer("running", torch.zeros(4))
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(
        self, x: torch.Tensor, scale: float = 2.0, *, pair: Any = None, flag: bool | None = None
    ) -> Any:
        y = self.linear(x) * self.constant + self.table * scale
        self.running.add_(x.detach().mean(0))
        x.mul_(2)
        return {"y": y + pair[0].sum() if pair else y, "flag": flag}


def test_the_signature_says_where_every_input_comes_from() -> None:
    module, pair = Everything(), (torch.ones(3, 2), None)
    graph = export_graph(module, (X.clone(),), {"pair": pair, "flag": True}, "eval")
    signature = graph.signature
    own = [spec for spec in signature.inputs if spec.source is not Source.USER]
    assert own == [
        InputSpec(Source.PARAMETER, "linear.weight"),
        InputSpec(Source.PARAMETER, "linear.bias"),
        InputSpec(Source.BUFFER, "running", mutated=True),
        InputSpec(Source.BUFFER, "table"),
        InputSpec(Source.CONSTANT, "constant"),
    ]
    assert signature.names == ("x", "pair", "flag")
    assert signature.user_inputs == (
        UserInput("x", (None, 4), torch.float32),
        UserInput("pair[0]", (None, 2), torch.float32),
        UserInput("pair[1]", None, None, None),
        UserInput("flag", None, None, True),
    )
    assert signature.buffer_outputs == ("running",)
    assert [signature.inputs[i].source for i in signature.input_outputs] == [Source.USER]
    assert torch.equal(graph.constants["constant"], module.constant)


def test_the_first_dimension_varies_where_the_model_lets_it() -> None:
    graph, _, _ = graph_of(lambda m, x: m.linear(x))
    assert graph.signature.user_inputs[0].shape == (None, 4)


def test_a_batch_of_one_stays_free() -> None:
    graph, have, want = graph_of(lambda m, x: m.linear(x), x=X[:1])
    assert graph.signature.user_inputs[0].shape == (None, 4)
    assert torch.equal(have, want)


def test_size_one_is_no_batch_beside_another_size() -> None:
    """Inputs are doubled only when all of them have one row; here the second broadcasts."""
    module = Pair()
    graph = export_graph(module, (X, X[:1]), {}, "eval")
    assert graph.signature.user_inputs[1].shape == (1, 4)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(x) - y


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """As in attention(x, x, x): a later call may tell them apart."""
    module = Pair()
    graph = export_graph(module, (X, X), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    assert torch.equal(run(X, 5 * X), module(X, 5 * X))


def row_by_row(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Fixes the batch size: the loop is unrolled while it is traced."""
    return torch.cat([module.linear(row) for row in x.split(1)])


FIXED = {
    "a loop": row_by_row,
    "a shape": lambda m, x: m.linear(x).reshape(2, 3, 4),
    "a number": lambda m, x: m.linear(x) * int(x.shape[0]),
    "another tensor": lambda m, x: m.linear(x) + torch.ones(6, 4),
    "a branch": lambda m, x: m.linear(x) if x.shape[0] > 5 else x,
}


@pytest.mark.parametrize("case", FIXED)
def test_a_size_that_the_trace_fixed_is_fixed(case: str) -> None:
    """Another batch would silently get the wrong rows, or the wrong branch: it is refused."""
    module = Function(FIXED[case])
    graph = export_graph(module, (X,), {}, "eval")
    run = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    assert torch.equal(run(X), module(X))
    for rows in (5, 1):
        with pytest.raises(ModelError):
            run(X[:rows])


# --- side effects --------------------------------------------------------------------------------


@pytest.mark.slow
def test_capture_leaves_flags_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    module[1].eval()
    before = [m.training for m in module.modules()]
    for mode in ("eval", "train"):
        export_graph(module, (X,), {}, mode)
        assert [m.training for m in module.modules()] == before

    def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.linear(x) if x.sum() > 0 else x

    failing = Function(branching).train()
    with pytest.raises(RuntimeError):
        export_graph(failing, (X,), {}, "eval")
    assert all(m.training for m in failing.modules())
    assert capsys.readouterr().out == ""


def test_inputs_that_forward_does_not_take() -> None:
    with pytest.raises(ModelError, match=r"do not fit the model's forward: .*'z'"):
        export_graph(Function(lambda m, x: m.linear(x)), (X,), {"z": X}, "eval")


@pytest.mark.parametrize("was_on", [True, False])
def test_a_trace_leaves_the_garbage_collector_as_it_was(
    was_on: bool,
) -> None:
    """Off while it traces; also after a trace that fails."""
    seen: list[bool] = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(gc.isenabled())
            if len(seen) > 1:
                raise ValueError("no more")
            return x + 1

    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        export_graph(Watching(), (torch.ones(2),), {}, "eval")
        assert gc.isenabled() == was_on
        with pytest.raises(ValueError, match="no more"):
            export_graph(Watching(), (torch.ones(2),), {}, "eval")
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()
    assert seen
    assert not any(seen)
