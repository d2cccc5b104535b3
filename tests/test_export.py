"""One module in one mode as a functional graph: its repairs, its names, its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from amp_convert.errors import ModelError
from amp_convert.export import CapturedGraph, export_graph, is_library_frame, op_name, short_path
from amp_convert.runner import GraphRunner, InputSpec, Source, UserInput
from tests.zoo import captured, every_model

aten = torch.ops.aten
X = torch.linspace(-1, 1, 24).reshape(6, 4)


def calls(graph: CapturedGraph) -> list[fx.Node]:
    return [n for n in graph.graph_module.graph.nodes if n.op == "call_function"]


def targets(graph: CapturedGraph) -> list[Any]:
    return [n.target for n in calls(graph)]


class Function(nn.Module):
    """A function of the input and one linear layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def graph_of(function: Callable[..., Any], mode: str = "eval", x: torch.Tensor = X) -> Any:
    """(graph, what it returns for x, what the function returns for x)"""
    module = Function(function).train(mode == "train")
    graph = export_graph(module, (x,), {}, mode)
    runner = GraphRunner(graph.graph_module, graph.signature, graph.constants, module)
    return graph, runner(x), module(x)


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


# --- repair 1: explicit casts --------------------------------------------------------------------

NO_OPS = {
    "float": lambda m, x: m.linear(x).float(),
    "to dtype": lambda m, x: m.linear(x).to(torch.float32),
    "to keyword": lambda m, x: m.linear(x).to(dtype=torch.float32),
    "to device and dtype": lambda m, x: m.linear(x).to("cpu", torch.float32),
    "to other": lambda m, x: m.linear(x).to(x),
    "to copy": lambda m, x: m.linear(x).to(torch.float32, copy=True),
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


# --- names ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x


class Nested(nn.Module):
    """Calls one block twice; one operator at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.blocks
        return first(second(first(x))).exp()


def test_identity_layer_and_class_of_every_node() -> None:
    graph = export_graph(Nested(), (X,), {}, "eval")
    assert [info.identity for info in graph.nodes.values()] == [
        "blocks.0.linear/aten.linear#0",
        "blocks.0/aten.relu#0",
        "blocks.0/aten.add#0",
        "blocks.1.linear/aten.linear#0",
        "blocks.1/aten.relu#0",
        "blocks.1/aten.add#0",
        "blocks.0.linear/aten.linear#1",
        "blocks.0/aten.relu#1",
        "blocks.0/aten.add#1",
        "/aten.exp#0",
    ]
    first, *_, last = graph.nodes.values()
    assert first.layer == "blocks.0.linear"
    assert first.modules == (
        "torch.nn.modules.linear.Linear",
        f"{__name__}.Block",
        f"{__name__}.Nested",
    )
    assert (first.op, first.short_op) == ("aten.linear.default", "aten.linear")
    assert (last.layer, last.modules) == ("", (f"{__name__}.Nested",))


def test_a_part_is_named_by_its_place_in_the_whole() -> None:
    graph = export_graph(Block(), (X,), {}, "eval", "encoder.0")
    identities = [info.identity for info in graph.nodes.values()]
    assert identities[0] == "encoder.0.linear/aten.linear#0"
    assert identities[1] == "encoder.0/aten.relu#0"


@every_model
def test_identities_are_unique_and_survive_recapture(name: str) -> None:
    region = captured(name).regions[0]
    for mode, graph in region.graphs.items():
        identities = [info.identity for info in graph.nodes.values()]
        assert len(set(identities)) == len(identities)
        assert set(graph.nodes) == {n.name for n in calls(graph)}
        if name in ("cnn", "vit"):
            again = export_graph(region.module, region.args, region.kwargs, mode)
            assert again.nodes == graph.nodes


def test_the_location_is_the_users_line() -> None:
    graph = export_graph(Nested(), (X,), {}, "eval")
    locations = {info.identity: info.location for info in graph.nodes.values()}
    block = inspect.getsourcelines(Block.forward)[1] + 1
    top = inspect.getsourcelines(Nested.forward)[1] + 2
    assert locations["blocks.0/aten.relu#0"] == f"tests/test_export.py:{block}"
    assert locations["/aten.exp#0"] == f"tests/test_export.py:{top}"
    # Inside torch.nn.Linear the user's line is the one that calls the layer.
    assert locations["blocks.1.linear/aten.linear#0"] == f"tests/test_export.py:{block}"


@every_model
def test_no_location_is_within_pytorch(name: str) -> None:
    """Export makes nodes of its own, for sizes, and says that PyTorch's code is where they are."""
    for graph in captured(name).regions[0].graphs.values():
        located = {info.location for info in graph.nodes.values() if info.location}
        assert located or name == "transformer"  # all of it is PyTorch's own code
        assert not {place for place in located if place.startswith("torch/")}


def test_frames_and_paths(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_library_frame(torch.nn.__file__)
    assert is_library_frame(inspect.getsourcefile(export_graph) or "")
    assert is_library_frame("<string>")
    assert not is_library_frame(__file__)
    assert not is_library_frame(torch.__file__.replace("torch/__init__.py", "torchvision/a.py"))
    assert short_path(torch.nn.__file__) == "torch/nn/__init__.py"
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "models" / "net.py")) == "models/net.py"
    assert short_path("/elsewhere/net.py") == "/elsewhere/net.py"


def test_operator_names() -> None:
    def function(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.linear(x).max(dim=0).values

    graph, _, _ = graph_of(function)
    assert [op_name(n) for n in calls(graph)] == [
        "aten.linear.default",
        "aten.max.dim",
        "operator.getitem",
    ]
    assert [info.short_op for info in graph.nodes.values()][1] == "aten.max"


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


def test_capture_leaves_flags_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    module = Nested()
    module.blocks[1].eval()
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
        export_graph(Nested(), (X,), {"z": X}, "eval")
