"""What a refusal of torch.export means: real ones, from models of each kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amp_convert.capture.captured import Uncaptured
from amp_convert.capture.refusals import refusal_of
from amp_convert.capture.regions import capture


class Around(nn.Module):
    """A layer, and around it what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class Branch(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)  # type: ignore[no-any-return]


class Loop(Around):
    def forward(self, x: Tensor) -> Tensor:
        return sum(self.layer(x) for _ in range(int(x.abs().sum())))  # type: ignore[return-value]


class Numpy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sort(self.layer(x).numpy()))


class Thing:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Object(Around):
    def forward(self, x: Tensor) -> Thing:
        return Thing(self.layer(x))


@torch.library.custom_op("amp_convert_tests::untraceable", mutates_args=())
def untraceable(x: Tensor) -> Tensor:
    return x * 2


class Custom(Around):
    def forward(self, x: Tensor) -> Tensor:
        return untraceable(self.layer(x))


class Generator(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(4, generator=torch.Generator().manual_seed(0))


class Forces(Around):
    """The gradient of an energy, which it detaches from what came before."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.layer(x).square().sum(), x)[0]


class Nested(Around):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([*self.layer(x)]).to_padded_tensor(0.0)


def top(model: nn.Module) -> Uncaptured:
    """Why the top level of a model was not captured; its layer was."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    found = capture(model.eval(), (x,), {}, train=False)
    assert [region.path for region in found.regions] == ["layer"]
    return found.uncaptured[0]


@pytest.mark.parametrize(
    ("model", "means", "mend"),
    [
        (Branch, "its control flow, or a size, depends on the values", "torch.cond"),
        (Loop, "its control flow, or a size, depends on the values", "torch.cond"),
        (Numpy, "it takes a tensor out of PyTorch", "PyTorch's own functions"),
        (Object, "it takes or returns an object that PyTorch cannot take apart", "dataclasses"),
        (Custom, "it uses a custom operator that PyTorch cannot trace", "register_fake"),
        (Generator, "it holds or makes an object of TorchScript", "outside"),
        (Forces, "such as torch.autograd.grad inside of the forward pass", "Move that out"),
        (Nested, "on a sparse or nested tensor", "dense tensors"),
    ],
)
def test_what_pytorch_says_is_explained_first(
    model: type[nn.Module], means: str, mend: str
) -> None:
    part = top(model())
    meaning, _, raw = part.reason.partition(" (")
    assert means in meaning
    assert mend in part.mend
    assert raw.partition(":")[0].replace("_", "").isalnum()  # the class of PyTorch's exception
    assert len(raw) < 250


def test_what_is_not_known_is_said_to_be_so() -> None:
    found = refusal_of(KeyError("x" * 500))
    assert found.reason.startswith("PyTorch cannot trace it (KeyError: 'xxx")
    assert found.reason.endswith(" ...)")
    assert len(found.reason) < 250
    assert found.mend


def test_a_line_of_pythons_own_library_is_no_place() -> None:
    """`contextlib` is in the way of many exceptions."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner: Any = nn.Sequential(nn.Linear(4, 4)).eval()
            self.layer = nn.Linear(4, 4)
            self.small = torch.ao.quantization.quantize_dynamic(inner, {nn.Linear})

        def forward(self, x: Tensor) -> Tensor:
            return self.small(self.layer(x))  # type: ignore[no-any-return]

    part = top(Quantised())
    assert "such as a quantised layer" in part.reason
    assert "contextlib" not in part.location
