"""The check that a captured graph is the model: what it must notice, and that it leaves no trace.

Each difference is made by hand, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture import fidelity
from amp_convert.capture.fidelity import Fidelity
from amp_convert.capture.regions import capture
from tests.bits import assert_same_bits


class Net(nn.Module):
    """Dropout, a buffer that every call moves, and one output of each kind."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.steps += 1
        y = self.drop(self.linear(x))
        return {"y": y, "class": y.argmax(-1)}


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def check(call: Callable[[Net], Callable[..., Any]], mode: str = "eval", x: Any = X) -> Fidelity:
    """Compare the net with what `call` makes of it."""
    module = net()
    return fidelity.check(module, call(module), (x,), {}, mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_itself(mode: str) -> None:
    result = check(lambda module: module, mode)
    assert result == Fidelity(mode, "identical", True, True, True, 0.0, result.reason)
    assert "agree bit for bit" in result.reason


def altered(change: Callable[[Net, dict[str, torch.Tensor]], Any]) -> Any:
    def wrap(module: Net) -> Callable[..., Any]:
        def call(x: torch.Tensor) -> Any:
            result = dict(module(x))
            return change(module, result) or result

        return call

    return wrap


def last_bit(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and gradients but for one element, which is off by one in the last place."""
    bits = tensor.detach().view(torch.int32).clone()
    bits.view(-1)[0] += 1
    return tensor + (bits.view(torch.float32) - tensor.detach())


DIFFERENCES: dict[str, tuple[Any, tuple[bool, bool, bool]]] = {
    "one bit": (lambda m, r: {**r, "y": last_bit(r["y"])}, (False, True, True)),
    "a class": (lambda m, r: {**r, "class": r["class"] + 1}, (False, True, True)),
    "a dtype": (lambda m, r: {**r, "class": r["class"].int()}, (False, True, True)),
    "a shape": (lambda m, r: {**r, "class": r["class"][None]}, (False, True, True)),
    "an output less": (lambda m, r: {"y": r["y"]}, (False, True, True)),
    "an output more": (lambda m, r: {**r, "z": X}, (False, True, True)),
    "gradient": (lambda m, r: {**r, "y": 2 * r["y"] - r["y"].detach()}, (True, False, True)),
    "no gradient": (lambda m, r: {**r, "y": r["y"].detach()}, (True, False, True)),
    "buffer": (lambda m, r: m.steps.add_(1) and None, (True, True, False)),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_difference_is_noticed(kind: str, mode: str) -> None:
    change, (outputs, gradients, buffers) = DIFFERENCES[kind]
    result = check(altered(change), mode)
    assert result.status == "different"
    assert (result.outputs, result.gradients, result.buffers) == (outputs, gradients, buffers)
    assert result.max_rel_l2 > 0
    assert ("outputs" in result.reason) == (not outputs)
    assert ("gradients" in result.reason) == (not gradients)
    assert ("buffers" in result.reason) == (not buffers)


def test_the_largest_difference_is_reported() -> None:
    result = check(altered(lambda m, r: {**r, "y": r["y"] * 1.5}))
    assert result.max_rel_l2 == pytest.approx(0.5)
    assert "relative L2 5.0e-01" in result.reason


def test_random_state_is_the_same_for_both() -> None:
    """With dropout active, the two agree only when both draw the same numbers."""
    with_noise = altered(lambda m, r: {**r, "y": r["y"] + torch.rand(())})
    assert check(lambda module: module, "train").status == "identical"
    assert check(with_noise, "train").status == "different"


def test_equal_nans_are_no_difference() -> None:
    poisoned = X.clone()
    poisoned[0, 0] = math.nan
    assert check(lambda module: module, x=poisoned).status == "identical"
    other = altered(lambda m, r: {**r, "y": r["y"].nan_to_num()})
    assert check(other, x=poisoned).status == "different"


def test_a_model_without_buffers_or_gradients() -> None:
    module = nn.Linear(4, 2).requires_grad_(False)
    result = fidelity.check(module, module, (X,), {}, "eval")
    assert (result.outputs, result.gradients, result.buffers) == (True, None, None)
    assert result.status == "identical"


def test_it_leaves_no_trace() -> None:
    module, x = net(), X.clone()
    module.train()
    module.drop.eval()
    flags = [m.training for m in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    seed = torch.get_rng_state()
    with torch.no_grad():
        result = fidelity.check(module, module, (x,), {}, "train")
    assert result.gradients is True, "gradients are compared whatever the caller's grad mode"
    assert torch.equal(torch.get_rng_state(), seed)
    assert [m.training for m in module.modules()] == flags
    assert_same_bits(state, dict(module.state_dict()))
    assert torch.equal(x, X)
    assert all(p.grad is None for p in module.parameters())


def test_a_model_that_writes_to_its_input_gets_a_fresh_one_each_time() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2) * self.weight

    module, x = Doubling(), X.clone()
    assert fidelity.check(module, module, (x,), {}, "eval").status == "identical"
    assert torch.equal(x, X)


def test_flags_and_buffers_come_back_after_an_error() -> None:
    module = net().eval()

    def failing(x: torch.Tensor) -> Any:
        module(x)
        raise RuntimeError("broken graph")

    with pytest.raises(RuntimeError, match="broken graph"):
        fidelity.check(module, failing, (X,), {}, "train")
    assert not any(m.training for m in module.modules())
    assert float(module.steps) == 0


def test_a_model_that_cannot_train_on_the_example_is_unchecked() -> None:
    """BatchNorm refuses one row in training mode. That is no fault of the captured graph."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    result = fidelity.check(module, module, (X[:1],), {}, "train")
    assert result.status == "unchecked"
    assert "more than 1 value per channel" in result.reason


def test_a_model_without_a_backward_pass_is_still_compared_forward() -> None:
    """Eager PyTorch cannot differentiate it; inference can be converted all the same."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            x.copy_(y)
            return y

    module = Overwriting()
    result = fidelity.check(module, module, (X,), {}, "eval")
    assert result.outputs is True
    assert result.gradients is None
    assert "modified by an inplace operation" in result.reason


def test_without_values_nothing_is_checked() -> None:
    module = nn.Linear(4, 2, device="meta")
    result = fidelity.check(module, module, (X.to("meta"),), {}, "train")
    assert (result.mode, result.status) == ("train", "unchecked")
    assert (result.outputs, result.gradients, result.buffers) == (None, None, None)
    assert math.isnan(result.max_rel_l2)
    assert "no values" in result.reason


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -gradient


class _Adversarial(nn.Module):
    """A gradient that is turned round, which torch.export drops."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(_Reversed.apply(self.body(x)))  # type: ignore[no-untyped-call,no-any-return]


class _Spectral(nn.Module):
    """A slice of a complex tensor is written: in a graph that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = torch.fft.rfft(self.layer(x))
        kept = torch.zeros_like(f)
        kept[:, :3] = f[:, :3]
        return torch.fft.irfft(kept, n=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (_Spectral(), ["layer"]),
        (nn.Sequential(_Spectral(), nn.Linear(8, 8)), ["0.layer", "1"]),  # a part of it has none
    ],
)
def test_a_graph_without_a_derivative_is_trained_in_parts(
    model: nn.Module, parts: list[str]
) -> None:
    found = capture(model, (torch.randn(4, 8),), {})
    assert [list(region.graphs) for region in found.regions] == [["eval"]]
    assert found.training is not None
    assert [region.path for region in found.training.regions] == parts
    (train,) = (row for row in found.fidelity if row.mode == "train")
    assert train.status == "identical"
    assert "the captured graph has no gradients: slice_scatter does not support" in train.reason


@pytest.mark.slow
def test_a_graph_without_the_models_gradients_is_for_inference_alone() -> None:
    why = "torch.export drops the backward that _Reversed defines"
    made, x = _Adversarial(), torch.randn(4, 8)
    found = capture(made, (x,), {})
    rows = {row.mode: row for row in found.fidelity}
    assert (rows["eval"].status, rows["eval"].outputs, rows["eval"].gradients) == (
        "identical", True, None
    )  # fmt: skip
    assert why in rows["eval"].reason
    assert (rows["train"].status, why in rows["train"].reason) == ("unchecked", True)
    assert [list(region.graphs) for region in found.regions] == [["eval"]]
    assert why in found.regions[0].train_failure
    given = {
        "train_batches": lambda seed: [(x, None)] * 5,
        "loss": lambda outputs, _: outputs.square().mean(),
    }
    run = amp.check(made, x, **given)
    assert run.exit_code == 3
    (training,) = (check for check in run.verdict.checks if check.name == "training")
    assert why in training.reason
    assert amp.check(made, x, train=False, **given).verdict.status == "pass"
