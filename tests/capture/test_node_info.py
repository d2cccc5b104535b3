"""Names of captured nodes: operator, layer, and the user's file and line."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.export import export_graph
from amp_convert.capture.node_info import is_library_frame, short_path
from amp_convert.core.op_facts import op_name
from tests.exports import X, calls, graph_of
from tests.zoo import captured, every_model

aten = torch.ops.aten


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
    assert locations["blocks.0/aten.relu#0"] == f"tests/capture/test_node_info.py:{block}"
    assert locations["/aten.exp#0"] == f"tests/capture/test_node_info.py:{top}"
    # Inside torch.nn.Linear the user's line is the one that calls the layer.
    assert locations["blocks.1.linear/aten.linear#0"] == f"tests/capture/test_node_info.py:{block}"


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
    assert [op_name(n.target) for n in calls(graph)] == [
        "aten.linear.default",
        "aten.max.dim",
        "operator.getitem",
    ]
    assert [info.short_op for info in graph.nodes.values()][1] == "aten.max"
