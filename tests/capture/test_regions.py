"""Capturing a model whole, in parts, or not at all; and what one recorded run knows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert import api
from amp_convert.capture.captured import Value
from amp_convert.capture.regions import capture
from amp_convert.core.errors import AmpConvertError, ModelError, UnsupportedModelError
from tests.zoo import assert_same_bits, captured, every_model, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Branching(nn.Module):
    """A branch that depends on values between two parts; one part is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(8, 8), Stubborn()])
        self.last = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.first(x)
        if y.sum() > 1e9:
            y = -y
        y = self.blocks[1](self.blocks[0](self.blocks[0](y)))
        return {"y": self.last(y) * self.scale}


class Stubborn(nn.Module):
    """Cannot be captured itself, but its layer can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() > 1e9:
            x = x / 2
        return self.inner(x)


def branching() -> Branching:
    torch.manual_seed(0)
    return Branching().eval()


def line(function: Any, text: str) -> str:
    """`file:line` of the line of a function that holds `text`."""
    lines, start = inspect.getsourcelines(function)
    offset = next(i for i, content in enumerate(lines) if text in content)
    return f"tests/capture/test_regions.py:{start + offset}"


# --- the whole model -----------------------------------------------------------------------------


@every_model
def test_every_model_of_the_zoo_is_captured_whole(name: str) -> None:
    found = captured(name)
    assert found.is_whole
    assert not found.uncaptured
    assert [f.mode for f in found.fidelity] == ["eval", "train"]
    for fidelity in found.fidelity:
        assert fidelity.status == "identical", fidelity.reason
        assert fidelity.outputs is fidelity.gradients is True
        assert fidelity.buffers is (True if list(found.model.buffers()) else None)
        assert fidelity.max_rel_l2 == 0


@every_model
def test_the_recorded_run_knows_every_value(name: str) -> None:
    """Shapes and dtypes are those of the example inputs; the last ones are the outputs'."""
    region = captured(name).regions[0]
    model, args, kwargs = example(name)
    with mode(model), torch.no_grad():
        want = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if torch.is_tensor(t)]
    values = region.traces["eval"].values
    graph = region.graphs["eval"].graph_module.graph
    assert set(values) == {node.name for node in graph.nodes}
    outputs = [values[n.name] for n in graph.find_nodes(op="output")[0].args[0] if n is not None]
    outputs = outputs[len(region.graphs["eval"].signature.buffer_outputs) :]
    assert [(v.shape, v.dtype) for v in outputs] == [(tuple(t.shape), t.dtype) for t in want]
    for trace in region.traces.values():
        for value in pytree.tree_leaves(list(trace.values.values())):
            assert value is None or isinstance(value, Value | int | float | bool)
        assert sum(trace.macs.values()) > 0


@pytest.mark.slow
def test_recorded_values_of_a_small_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.linear(x).transpose(0, 1)
            return y.max(dim=1), y.shape[1] * y.half()

    region = capture(Net(), (X,), {}).regions[0]
    by_op = {region.graphs["eval"].nodes[n].short_op: v
             for n, v in region.traces["eval"].values.items()
             if n in region.graphs["eval"].nodes}  # fmt: skip
    cpu = torch.device("cpu")
    assert by_op["aten.linear"] == Value((6, 3), (3, 1), torch.float32, cpu)
    assert by_op["aten.transpose"] == Value((3, 6), (1, 3), torch.float32, cpu)
    assert by_op["aten.max"] == (
        Value((3,), (1,), torch.float32, cpu),
        Value((3,), (1,), torch.int64, cpu),
    )
    assert by_op["aten.sym_size"] == 6
    assert by_op["aten._to_copy"].dtype == torch.float16


def test_macs_go_to_the_node_that_spends_them() -> None:
    region = captured("cnn").regions[0]
    nodes, macs = region.graphs["eval"].nodes, region.traces["eval"].macs
    spent = {nodes[n].identity: count for n, count in macs.items() if count}
    assert spent == {
        "conv1/aten.conv2d#0": 4 * 8 * 8 * 8 * 3 * 9,
        "conv2/aten.conv2d#0": 4 * 8 * 8 * 8 * 8 * 9,
        "classify/aten.linear#0": 4 * 8 * 5,
    }


class RowByRow(nn.Module):
    """Unrolls a loop over the batch, so that only one size fits the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(row) for row in x.split(1)])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_fixed_batch_is_the_examples_even_if_it_is_one(rows: int) -> None:
    """A batch of one is traced as two, which is another thing to a model such as this."""
    model = RowByRow().eval()
    mixed = amp.convert(model, X[:rows], rules="fp32")
    frozen = mixed.freeze()
    assert torch.equal(mixed(X[:rows]), model(X[:rows]))
    for other in {1, 2, 3, 6} - {rows}:
        with pytest.raises(ModelError):
            frozen(X[:other])
        assert torch.equal(mixed(X[:other]), model(X[:other]))  # no graph, but under the plan


# --- side effects --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("build", [branching, lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout())])
def test_capture_leaves_the_model_alone(
    build: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    model = build().train()
    next(model.children()).eval()
    flags = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed, x = torch.get_rng_state(), X.clone()
    capture(model, (x,), {})
    assert [m.training for m in model.modules()] == flags
    assert_same_bits(state, dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(x, X)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert capsys.readouterr().out == ""


# --- in parts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_outermost_parts_that_can_be_captured_are() -> None:
    found = capture(branching(), (X,), {})
    assert not found.is_whole
    assert [region.path for region in found.regions] == [
        "first", "blocks.0", "blocks.1.inner", "last",
    ]  # fmt: skip
    assert [part.layer for part in found.uncaptured] == ["", "blocks.1"]
    whole, stubborn = found.uncaptured
    assert whole.location == line(Branching.forward, "if y.sum()")
    assert stubborn.location == line(Stubborn.forward, "while x.abs()")
    assert "data-dependent" in whole.reason
    assert "\n" not in whole.reason
    layers = {i.layer for r in found.regions for i in r.graphs["eval"].nodes.values()}
    assert layers == {"first.0", "first.1", "first.2", "blocks.0", "blocks.1.inner", "last"}


@pytest.mark.slow
def test_fidelity_of_parts_is_the_worst_of_them() -> None:
    found = capture(branching(), (X,), {})
    assert [(f.mode, f.status) for f in found.fidelity] == [
        ("eval", "identical"),
        ("train", "identical"),
    ]
    model = branching()
    model.last = OtherPathWhileTraced()
    found = capture(model, (X,), {})
    assert [f.status for f in found.fidelity] == ["different", "different"]
    assert found.fidelity[0].reason.startswith("last: outputs")


class OtherPathWhileTraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2 if torch.compiler.is_exporting() else 1)


@pytest.mark.slow
def test_a_model_that_takes_another_path_while_traced_is_found_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), OtherPathWhileTraced())
    evaluated, trained = capture(model, (X,), {}).fidelity
    assert evaluated.status == trained.status == "different"
    assert (evaluated.outputs, evaluated.gradients, evaluated.buffers) == (False, False, None)
    assert evaluated.max_rel_l2 == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fp32", "default"])
def test_a_model_in_parts_works_like_any_other(rules: str) -> None:
    model = branching()
    mixed = amp.convert(model, X, rules=rules)
    assert list(mixed.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), mixed.parameters(), strict=True))
    assert [part.layer for part in mixed.plan.uncaptured] == ["", "blocks.1"]
    tolerance = {"rtol": 0, "atol": 0} if rules == "fp32" else {"rtol": 1e-2, "atol": 1e-2}
    for rows in (6, 2):
        torch.testing.assert_close(mixed(X[:rows])["y"], model(X[:rows])["y"], **tolerance)
    with torch.no_grad():
        want = mixed(X)
    frozen = mixed.freeze()
    assert_same_bits(want, frozen(X))
    assert set(frozen.state_dict()) <= set(model.state_dict())
    expected = torch.float32 if rules == "fp32" else torch.float16
    assert frozen.state_dict()["first.0.weight"].dtype == expected
    assert frozen.state_dict()["scale"].dtype == torch.float32
    mixed(X)["y"].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_a_model_in_parts_is_compared_in_parts() -> None:
    model = branching()
    mixed = amp.convert(model, X)
    divergence = api.compare(model, mixed, [X, X * 2])
    assert [row.node for row in divergence.nodes] == [d.node for d in mixed.plan.eval]
    with torch.no_grad():
        pairs = [(model(x)["y"].double(), mixed(x)["y"].double()) for x in (X, X * 2)]
    error = sum(float((b - a).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
    assert divergence.outputs[0].name == "y"
    assert divergence.outputs[0].rel_l2 == pytest.approx(error / norm, rel=1e-9)
    # blocks.0 runs twice a batch; its second call sees the error of its first.
    twice = next(row for row in divergence.nodes if row.node == "blocks.0/aten.linear#0")
    assert 0 < twice.local_rel_l2 < 1e-3
    assert twice.accumulated_rel_l2 > twice.local_rel_l2


@pytest.mark.slow
def test_a_model_in_parts_trains() -> None:
    model, twin = branching(), branching()
    mixed = amp.convert(model, X, rules="fp32").train()
    twin.train()
    for step in range(2):
        assert_same_bits(twin(X + step), mixed(X + step))
    assert_same_bits(dict(twin.state_dict()), dict(model.state_dict()))
    assert int(model.first[1].num_batches_tracked) == 2


@pytest.mark.slow
def test_the_original_keeps_its_own_parts() -> None:
    """Converted parts stand in for its own only while the converted model runs, or fails to."""
    model, twin = branching(), branching()
    before = dict(model.named_modules())
    mixed = amp.convert(model, X, rules="half")
    assert not torch.equal(mixed(X)["y"], twin(X)["y"])
    with pytest.raises(AmpConvertError):
        mixed(X[:, :2])
    assert dict(model.named_modules()) == before
    assert_same_bits(twin(X), model(X))
    mixed.freeze()(X)
    assert_same_bits(twin(X), model(X))


@pytest.mark.slow
def test_a_copy_of_a_model_in_parts_is_independent() -> None:
    mixed = amp.convert(branching(), X)
    for original in (mixed, mixed.freeze()):
        twin, want = copy.deepcopy(original), original(X)
        assert_same_bits(want, twin(X))
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
        assert not twin(X)["y"].any()
        assert_same_bits(want, original(X))


class CalledWithTwoShapes(nn.Module):
    """One layer, two ranks of input: no single graph serves both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(self.shared(x)[None])[0]
        return self.other(y) if y.sum() < 1e9 else y


@pytest.mark.slow
def test_a_part_that_one_graph_cannot_serve_stays_eager() -> None:
    torch.manual_seed(0)
    model = CalledWithTwoShapes()
    found = capture(model, (X,), {})
    assert [region.path for region in found.regions] == ["other"]
    assert [part.layer for part in found.uncaptured] == ["", "shared"]
    assert "has shape" in found.uncaptured[1].reason
    mixed = amp.convert(model, X)
    torch.testing.assert_close(mixed(X), model(X), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_part_that_is_not_reached_stays_as_it_is() -> None:
    class Net(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

    torch.manual_seed(0)
    model = Net().eval()
    mixed = amp.convert(model, X)
    assert "unused" not in {region.path for region in mixed.captured.regions}
    assert "unused.weight" in mixed.state_dict()


# --- not at all ----------------------------------------------------------------------------------


class Hopeless(nn.Module):
    """Nothing but control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x * self.weight).sum() > 0:
            return x
        return -x


def test_nothing_to_capture_names_the_users_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="no part of the model can be captured") as hit:
        capture(Hopeless(), (X,), {})
    error = hit.value
    assert error.exit_code == 4
    assert error.where == line(Hopeless.forward, "if (x * self.weight)")
    assert error.mend
    assert "\n" not in str(error)
    assert capsys.readouterr().out == ""


def test_a_model_that_fails_in_eager_mode_is_not_called_unsupported() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    with pytest.raises(AmpConvertError) as hit:
        capture(Broken(), (X,), {})
    assert hit.value.exit_code == 2
    assert "cannot be multiplied" in str(hit.value)


# --- what models do ------------------------------------------------------------------------------


@pytest.mark.slow
def test_explicit_casts_hold_in_the_mixed_graph() -> None:
    """`.float()` does nothing in FP32; behind a layer that became FP16 it is an upcast."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.first(x)
            own = (y.half() * 3).exp()
            return self.last(y.float() * 1000), own, y.to(torch.float32)

    torch.manual_seed(0)
    model = Net().eval()
    for dtype in (torch.float16, torch.bfloat16):
        mixed = amp.convert(model, X, dtype=dtype)
        by_node = {d.node: d for d in mixed.plan.eval}
        assert by_node["first/aten.linear#0"].dtype == str(dtype).removeprefix("torch.")
        assert by_node["/aten.to#0"].dtype == "float32"
        assert by_node["/aten.mul#1"].dtype == "float32", "what follows .float() stays FP32"
        own = [d for d in mixed.plan.eval if d.dtype == "float16" and not d.low]
        assert [d.op for d in own if d.op != "aten._to_copy"] == ["aten.mul", "aten.exp"]
        result = mixed(X)
        assert [t.dtype for t in result] == [torch.float32, torch.float16, torch.float32]


@pytest.mark.slow
def test_a_constant_of_the_models_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.table = torch.arange(4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])

    torch.manual_seed(0)
    model = Net().eval()
    assert_same_bits(model(X), amp.convert(model, X, rules="fp32")(X))
    mixed = amp.convert(model, X)
    torch.testing.assert_close(mixed(X), model(X), rtol=1e-2, atol=1e-2)
    assert list(mixed.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert_same_bits(mixed(X), mixed.freeze()(X))


@pytest.mark.slow
def test_an_input_that_the_model_changes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x * 1)  # backward needs what linear reads
            x.copy_(y)
            return y

    torch.manual_seed(0)
    model, given = Net().eval(), X.clone()
    mixed = amp.convert(model, given)
    assert torch.equal(given, X), "the example inputs are left as they are"
    with torch.no_grad():
        result = mixed(given)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, result)
    torch.testing.assert_close(given, torch.nn.functional.linear(X, *model.linear.parameters()),
                               rtol=1e-2, atol=1e-2)  # fmt: skip


@pytest.mark.slow
def test_calls_of_a_whole_model_are_its_inputs() -> None:
    found = captured("cnn")
    args = example("cnn")[1]
    [(region, call)] = found.calls(args, {})
    assert region is found.regions[0]
    assert call == (args, {})
    assert found.device == torch.device("cpu")


@pytest.mark.slow
def test_calls_of_parts_are_what_the_parts_receive() -> None:
    model = branching()
    found = capture(model, (X,), {})
    calls = found.calls((X * 2,), {})
    assert [region.path for region, _ in calls] == [
        "first", "blocks.0", "blocks.0", "blocks.1.inner", "last",
    ]  # fmt: skip
    with torch.no_grad():
        first = model.first(X * 2)
        second = model.blocks[0](first)
    received = [args[0] for _, (args, _) in calls]
    assert torch.equal(received[0], X * 2)
    assert torch.equal(received[1], first)
    assert torch.equal(received[2], second)
