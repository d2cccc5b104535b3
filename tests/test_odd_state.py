"""Models that keep a state, write to what they are given, or hold odd tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError
from tests.odd_models import Stateful


class Hidden(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.state = h.detach() if self.state is None else (h + 0.5 * self.state).detach()
        return self.last(h + self.state)  # type: ignore[no-any-return]


class Counted(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.state = (self.state or 0) + 1
        return self.last(self.layer(x) * (1 + self.state % 2))  # type: ignore[no-any-return]


class Cached(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.state = [*(self.state or []), self.layer(x).detach()]
        return self.last(torch.stack(self.state).mean(0))  # type: ignore[no-any-return]


class Calls(Stateful):
    """It only counts its calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.state = (self.state or 0) + 1
        return self.last(self.layer(x))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("of", [Hidden, Counted, Cached])
def test_state_in_an_attribute_is_carried_on(of: type[Stateful]) -> None:
    """A graph would hold the state of one call for ever: the parts are converted, the rest runs."""
    torch.manual_seed(0)
    model = of().eval()
    batches = [torch.randn(16, 16) for _ in range(3)]
    run = amp.check(model, batches[0])
    assert run.verdict.status == "pass"
    assert "state changes what the next call gives" in run.plan.uncaptured[0].reason
    assert model.state is None
    with torch.no_grad():
        want = [model(x) for x in batches]
        model.state = None
        have = [run.converted(x) for x in batches]
    for a, b in zip(want, have, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_a_count_of_calls_is_no_state() -> None:
    torch.manual_seed(0)
    assert amp.convert(Calls().eval(), torch.randn(16, 16)).captured.is_whole


@pytest.mark.slow
def test_each_arm_of_a_training_has_a_state_of_its_own() -> None:
    def batches(seed: int) -> Iterator[Any]:
        for i in range(40):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1000 * seed + i))
            yield x, x.flip(1)

    torch.manual_seed(0)
    run = amp.check(
        Hidden().eval(),
        next(batches(0))[0],
        train_batches=batches,
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    checks = {check.name: check.status for check in run.verdict.checks}
    assert checks["training.gradients"] == checks["training.loss"] == "pass"


class WritesToItself(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        return self.last(self.layer(x))  # type: ignore[no-any-return]


def test_a_parameter_that_is_written_to_in_inference() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=r"to its parameter layer\.weight in inference"):
        amp.convert(WritesToItself().eval(), torch.randn(16, 16))


class InPlace(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x.mul_(2)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_users_inputs_are_as_they_were() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    kept = x.clone()
    assert amp.check(InPlace().eval(), x).verdict.status == "pass"
    assert torch.equal(x, kept)


class Compressed(nn.Module):
    """A sparse adjacency in the format that PyTorch neither traces nor copies."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(16).to_sparse_csr())
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.adjacency @ self.layer(x)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_buffer_in_a_compressed_sparse_format() -> None:
    torch.manual_seed(0)
    run = amp.check(Compressed().eval(), torch.randn(16, 16))
    assert run.verdict.status == "pass"
    assert run.plan.share_macs_low() > 0.5
    assert run.converted.freeze()(torch.randn(16, 16)).isfinite().all()


@pytest.mark.slow
def test_a_sparse_input() -> None:
    class Propagates(Stateful):
        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return self.last(torch.sparse.mm(adjacency, self.layer(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = (torch.eye(16).to_sparse(), torch.randn(16, 16))
    assert amp.check(Propagates().eval(), inputs).verdict.status == "pass"
