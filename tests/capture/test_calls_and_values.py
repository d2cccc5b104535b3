"""What models do with values of their own, with inputs that they change, and what parts receive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture.regions import capture
from tests.bits import assert_same_bits
from tests.capture.branching_models import branching
from tests.zoo import captured, example

X = torch.linspace(-1, 1, 24).reshape(6, 4)


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
