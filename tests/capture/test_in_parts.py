"""Models that can be captured only in parts, or not at all."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert import api
from amp_convert.capture.regions import capture
from amp_convert.core.errors import AmpConvertError, UnsupportedModelError
from tests.bits import assert_same_bits
from tests.capture.branching_models import Branching, Stubborn, branching

X = torch.linspace(-1, 1, 24).reshape(6, 4)


def line(function: Any, text: str) -> str:
    """`file:line` of the line of a function that holds `text`."""
    lines, start = inspect.getsourcelines(function)
    offset = next(i for i, content in enumerate(lines) if text in content)
    file = Path(inspect.getfile(function)).name
    return f"tests/capture/{file}:{start + offset}"


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
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
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


class Hopeless(nn.Module):
    """Nothing but control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x * self.weight).sum() > 0:
            return x
        return -x


# --- not at all ----------------------------------------------------------------------------------


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
