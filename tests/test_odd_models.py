"""Models that once ended as a fault of ours, or were put down to their users."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import amp_convert as amp


class Scripted(nn.Module):
    """One of its parts is TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.script = torch.jit.script(nn.Linear(8, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.script(x))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_scripted_part_stays_eager_and_the_rest_is_converted() -> None:
    torch.manual_seed(0)
    run = amp.check(Scripted().eval(), torch.randn(16, 8))
    assert run.verdict.status == "pass"
    assert {d.node: d.low for d in run.plan.eval} == {"layer/aten.linear#0": True}
    assert run.plan.share_macs_low() == 0.5


class Features(nn.Module):
    """It puts its result into the dict that it is given, as sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features.update(emb=self.layer(features["x"]))
        return features


@pytest.mark.slow
def test_a_model_that_writes_into_its_inputs() -> None:
    torch.manual_seed(0)
    inputs = ({"x": torch.randn(16, 8)},)
    batches = [(({"x": torch.randn(16, 8)},), None) for _ in range(2)]
    run = amp.check(Features().eval(), inputs, eval_batches=batches)
    assert run.verdict.status == "pass"
    assert all(list(given[0]) == ["x"] for given in (inputs, *(batch[0] for batch in batches)))


class Graph(nn.Module):
    """A sparse adjacency in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        dense = (torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) > 0.7).float()
        self.register_buffer("adjacency", (dense / 20).to_sparse())
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(torch.sparse.mm(self.adjacency, self.one(x)))
        return self.two(h)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_sparse_buffer_trains() -> None:
    torch.manual_seed(0)

    def batches(seed: int) -> Iterator[Any]:
        for i in range(30):
            x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1000 * seed + i))
            yield x, x[:, :4].argmax(1)

    run = amp.check(
        Graph().eval(),
        next(batches(0))[0],
        train_batches=batches,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
    )
    checks = {check.name: check.status for check in run.verdict.checks}
    assert run.report.training.run.steps == 30  # type: ignore[union-attr]
    assert "fail" not in checks.values()
    assert checks["training.gradients"] == checks["training.steps"] == "pass"


class Variable:
    """Holds a parameter outside of any module, as Keras does."""

    def __init__(self, value: nn.Parameter) -> None:
        self.value = value


class Dense(nn.Module):
    """It reaches for its parameters through variables; torch.export takes them for constants."""

    numbers = 0

    def __init__(self) -> None:
        super().__init__()
        kernels = [nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)]
        self.variables = tuple(map(Variable, kernels))
        self.held = nn.ParameterDict(
            {f"dense_{Dense.numbers + i}": k for i, k in enumerate(kernels)}
        )
        Dense.numbers += 2

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.variables[0].value).relu() @ self.variables[1].value


def dense(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Dense()


@pytest.mark.slow
def test_parameters_that_are_used_outside_of_their_modules_train() -> None:
    """Their names differ from model to model, as Keras numbers layers over all models."""

    def batches(seed: int) -> Iterator[Any]:
        for i in range(60):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1000 * seed + i))
            yield x, x[:, :4].argmax(1)

    run = amp.check(
        dense(0),
        next(batches(0))[0],
        train_batches=batches,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
        initial_model=dense,
    )
    checks = {check.name: check.status for check in run.verdict.checks}
    assert checks["fidelity.train"] == checks["training.gradients"] == "pass"
    assert checks["training.learnt"] == checks["training.steps"] == "pass"


class Output(OrderedDict[str, Tensor]):
    """An output class of diffusers, which does not tell PyTorch what its entries are called."""


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Output:
        return Output(sample=self.layer(x))


@pytest.mark.slow
def test_output_classes_whose_entries_have_no_names() -> None:
    torch.manual_seed(0)
    run = amp.check(Denoiser().eval(), torch.randn(16, 16))
    assert run.verdict.status == "pass"
    assert {check.name: check.status for check in run.verdict.checks}["fidelity.eval"] == "pass"


class Forces(nn.Module):
    """An energy, and the forces as its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.last = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.last(self.energy(x)).sum((1, 2))
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), -gradient


@pytest.mark.slow
def test_a_gradient_inside_of_the_forward_pass() -> None:
    """The layers are converted, and run forward and backward inside of the eager model."""
    torch.manual_seed(0)
    run = amp.check(Forces().eval(), torch.randn(16, 8, 3))
    assert run.verdict.status == "pass"
    assert [region.path for region in run.converted.captured.regions] == ["energy", "last"]
    assert run.plan.share_macs_low() == 0.5  # the backward pass counts as eager work
