"""Capturing a model whole, in parts, or not at all; and what one recorded run knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.capture.captured import Value
from amp_convert.capture.regions import capture
from amp_convert.core.errors import ModelError
from tests.bits import assert_same_bits
from tests.capture.branching_models import branching
from tests.zoo import captured, every_model, example, mode

X = torch.linspace(-1, 1, 24).reshape(6, 4)


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
