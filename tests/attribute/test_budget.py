"""Which node's rounding the outputs' error comes from: held against what rounding really does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.attribute import budget as attributing
from amp_convert.attribute.budget import attribute
from amp_convert.attribute.results import Budget, Doubt
from amp_convert.core import device as devices
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.bits import same_bits
from tests.zoo import both_dtypes, build, converted

LOW = (torch.float16, torch.bfloat16)


class Chain(nn.Module):
    """Linear layers of which each is called through `between`."""

    def __init__(self, between: Callable[..., Any] = F.gelu, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.last = nn.Linear(width, 8)
        self._between = between

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self._between(self.second(self._between(self.first(x)))))


def budget_of(model: nn.Module, *args: Any, dtype: torch.dtype = LOW[0], **options: Any) -> Budget:
    rules = options.pop("rules", "default")
    mixed = amp.convert(model.eval(), args, dtype=dtype, rules=rules, train=False)
    return attribute(mixed, args, {}, **options)


def chain(**options: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(**options)


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", LOW)
def test_the_nodes_add_up_to_the_error(dtype: torch.dtype) -> None:
    found = budget_of(chain(), X, dtype=dtype)
    assert 0.7 < found.additivity < 1.4
    assert found.doubts == ()
    assert math.isclose(sum(node.share for node in found.nodes), 1)
    rows = [node.rel_l2 for node in found.nodes]
    assert rows == sorted(rows, reverse=True)
    assert math.isclose(math.sqrt(sum(r * r for r in rows)), found.predicted_rel_l2)


def test_of_a_linear_layer_the_error_is_known() -> None:
    """With one node, its part is the whole error, measured without us."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    found = budget_of(model, torch.randn(256, 64), vectors=32)
    assert [node.node for node in found.nodes] == ["0/aten.linear#0"]
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(x)
        have = F.linear(x.half(), model[0].weight.half(), model[0].bias.half()).float()
    assert math.isclose(
        found.nodes[0].rel_l2, float((have - want).norm() / want.norm()), rel_tol=0.15
    )
    assert math.isclose(found.nodes[0].rel_l2, found.measured_rel_l2, rel_tol=0.1)


def test_a_rounding_counts_once_however_many_nodes_hand_it_on() -> None:
    """Relu of a rounded value rounds nothing: twenty of them add nothing."""

    def many(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = F.relu(x)
        return x

    found = budget_of(chain(between=many), X)
    assert 0.6 < found.additivity < 1.5
    assert {node.op for node in found.nodes if node.rel_l2} == {"aten.linear"}


def test_each_node_adds_what_it_adds_alone(tmp_path: Path) -> None:
    """Held against the planner's own work: a plan in which one layer alone is low."""
    model = chain()
    found = {node.layer: node for node in budget_of(model, X, vectors=32).nodes}
    for layer in ("first", "second", "last"):
        alone = _but_for(model, "fp32", layer, "allow", tmp_path)
        with torch.no_grad():
            want, have = model(X), alone(X)
        error = float((have - want).norm() / want.norm())
        share = found[layer].rel_l2
        assert 0.5 < share / error < 1.5, (layer, share, error)


def _but_for(
    model: nn.Module, preset: str, layer: str, category: str, folder: Path
) -> ConvertedModel:
    """A model converted by a preset, but for one layer."""
    rule = f'[[rule]]\nlayer = "{layer}"\ncategory = "{category}"\nreason = "x"\n'
    path = folder / "rules.toml"
    path.write_text(f'extends = "{preset}"\n{rule}')
    return amp.convert(model.eval(), (X,), rules=str(path), train=False)


def test_a_planted_culprit_comes_first(tmp_path: Path) -> None:
    """What the last layer makes of it does not see the offset, which takes the bits."""
    model = chain(between=torch.neg)
    with torch.no_grad():
        model.second.bias.add_(1000)
        model.last.weight.sub_(model.last.weight.mean(1, keepdim=True))
    found = attribute(_but_for(model, "half", "last", "deny", tmp_path), (X,), {})
    assert found.nodes[0].layer == "second"
    assert found.nodes[0].share > 0.9


def test_fp32_owes_what_fp64_shows() -> None:
    model = chain()
    found = budget_of(model, X)
    with torch.no_grad():
        mine, exact = model(X).double(), model.double()(X.double())
    owed = float((mine - exact).norm() / exact.norm())
    assert found.floor_rel_l2 is not None
    assert 0.5 < found.floor_rel_l2 / owed < 2
    assert budget_of(chain(), X, floor=False).floor_rel_l2 is None


def test_the_same_seed_gives_the_same_budget_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    mixed = amp.convert(model.eval(), x)
    before = {name: t.clone() for name, t in mixed.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (attribute(mixed, (x,), {}, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one != other
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same_bits(before[name], t) for name, t in mixed.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad


class Router(nn.Module):
    """Two experts, and scores that are nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 2, bias=False)
        self.one, self.other = nn.Linear(32, 8), nn.Linear(32, 8)
        with torch.no_grad():
            self.gate.weight[1] = self.gate.weight[0] * (1 + 3e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).argmax(1, keepdim=True)
        return torch.where(chosen == 0, self.one(x), self.other(x))


def test_a_router_is_tried_since_no_gradient_shows_it() -> None:
    torch.manual_seed(0)
    found = budget_of(Router(), X, rules="half")
    assert Doubt.CHOICES in found.doubts
    assert found.nodes[0].layer == "gate"
    assert found.nodes[0].rel_l2 == 0
    assert found.nodes[0].trial_rel_l2 == pytest.approx(found.measured_rel_l2, rel=0.05)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).argmax(1)


def test_without_a_gradient_nodes_are_tried() -> None:
    torch.manual_seed(0)
    found = budget_of(Classes(), torch.randn(4096, 32), dtype=torch.bfloat16, rules="half")
    assert found.doubts == (Doubt.NO_GRADIENT,)
    assert found.vectors == 0
    assert found.measured_rel_l2 > 0
    assert all(node.trial_rel_l2 == node.rel_l2 for node in found.nodes)
    assert max(node.rel_l2 for node in found.nodes) > 0


def test_an_overflow_is_first_and_infinite() -> None:
    model = chain()
    with torch.no_grad():
        model.second.weight.mul_(1e7)
    found = budget_of(model, X, rules="half")
    assert Doubt.NONFINITE in found.doubts
    assert found.nodes[0].layer == "second"
    assert math.isinf(found.nodes[0].rel_l2)
    assert math.isinf(found.predicted_rel_l2)
    assert not any(math.isnan(node.rel_l2) for node in found.nodes)


class Several(nn.Module):
    """Two real outputs of very different size, classes beside them, and a node of three results."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        states, (last, _) = self.lstm(x)
        scores = self.head(states)
        return {"scores": scores * 1e-6, "last": last * 1e3, "classes": scores.argmax(-1)}


def test_each_output_counts_by_its_own_size() -> None:
    torch.manual_seed(0)
    found = budget_of(Several(), torch.randn(8, 5, 16))
    assert set(found.outputs) == {"scores", "last"}
    assert found.left_out == ("classes",)
    assert 0.5 < found.additivity < 2
    assert {"aten.lstm", "aten.linear"} <= {node.op for node in found.nodes if node.rel_l2}


def test_what_cannot_be_attributed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    mixed = amp.convert(model.eval(), X, train=False)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedModelError, match="GiB"):
        attribute(mixed, (X,), {})
    monkeypatch.setattr(attributing.devices, "free_bytes", lambda device: None)
    assert attribute(mixed, (X,), {}).nodes


def test_layers_are_their_nodes() -> None:
    found = budget_of(chain(), X)
    layers = found.layers()
    assert math.isclose(sum(layer.share for layer in layers), 1)
    assert [layer.rel_l2 for layer in layers] == sorted((r.rel_l2 for r in layers), reverse=True)
    frame = found.to_frame()
    assert list(frame["node"]) == [node.node for node in found.nodes]


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xdist_group(n))
        for n in ("cnn", "lstm", "bert", "gpt2", "t5", "vit", "llama", "mamba", "mixtral")
    ],
)
def test_every_model_adds_up(name: str, dtype: torch.dtype) -> None:
    _, args, kwargs = build(name)
    found = attribute(converted(name, "default", dtype), args, kwargs)
    assert 0.5 < found.additivity < 2
    assert found.doubts == ()
