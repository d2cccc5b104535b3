"""What a model keeps in plain attributes is put back after a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amp_convert as amp
from amp_convert.core.module_state import Attributes, other_tensors


class Keeps(nn.Module):
    """A hidden state, a cache, a log, a table and a tensor that it writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.state: Tensor | None = None
        self.cache: dict[int, Tensor] = {}
        self.log = [1]
        self.seen = {0}
        self.total = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.state = torch.tanh(y if self.state is None else y + self.state).detach()
        self.cache[len(self.cache)] = y
        self.log.append(2)
        self.seen.add(1)
        self.total += 1
        self.new = 3
        return self.state


def test_all_of_it_is_put_back() -> None:
    model = Keeps()
    log, total = model.log, model.total
    attributes = Attributes(model)
    assert attributes.changed() == ()
    model(torch.ones(2, 8))
    assert set(attributes.changed()) == {"state", "cache", "log", "seen", "total", "new"}
    attributes.restore()
    assert attributes.changed() == ()
    assert (model.state, model.cache, model.log, model.seen) == (None, {}, [1], {0})
    assert (model.log is log, model.total is total) == (True, True)
    assert torch.equal(model.total, torch.zeros(8))
    assert not hasattr(model, "new")


class Cell(nn.Module):
    """Its hidden state goes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.r, self.o = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.h if self.h is not None else torch.zeros(x.shape[0], 32)
        self.h = torch.tanh(self.i(x) + self.r(h)).detach()
        return self.o(self.h)  # type: ignore[no-any-return]


class Refines(nn.Module):
    """The number of iterations depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)
        with torch.no_grad():
            self.f.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(50):
            new = torch.tanh(self.f(z) + x)
            if float((new - z).abs().max()) < 3e-4:
                break
            z = new
        return z


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        (Cell, "buffers.kept", "the model writes to its attribute h in eval mode"),
        (Refines, "capture.paths", "took another path than in FP32"),
    ],
)
def test_a_model_with_state_or_early_exits_ends_in_a_verdict(
    model: Any, name: str, said: str
) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 16, generator=g), None) for _ in range(8)]
    made = model()
    run = amp.check(made, batches[0][0], eval_batches=batches)
    assert run.verdict.status == "pass"
    (check,) = (c for c in run.verdict.checks if c.name == name)
    assert (check.status, check.required) == ("unchecked", False)
    assert said in check.reason
    assert getattr(made, "h", None) is None


# --- other tensors -------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that two paths lead to, tied weights, and a buffer that the call writes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 4)
        self.two = nn.Sequential(self.one, nn.Linear(4, 4))
        self.two[1].weight = self.one.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.two(x) + self.one(x)


def test_a_model_runs_with_other_tensors_and_has_its_own_again() -> None:
    model, x = Shared(), torch.randn(3, 4)
    before = {id(t) for t in (*model.parameters(), *model.buffers())}
    held = {name: t.detach().clone() for name, t in model.state_dict().items()}
    asked: list[int] = []

    def doubled(tensor: Tensor) -> Tensor:
        asked.append(id(tensor))
        return tensor.detach() * 2

    with torch.no_grad(), other_tensors(model, doubled):
        assert model.one.weight is model.two[1].weight is model.two[0].weight
        have = model(x)
    assert len(asked) == len(set(asked)) == 4
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == before
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(have, model(x))


def test_they_come_back_where_the_call_fails() -> None:
    model = Shared()
    own = model.one.weight

    def fails() -> None:
        with other_tensors(model, torch.clone):
            model.register_parameter("more", nn.Parameter(torch.zeros(1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.one.weight is own
    assert "more" not in dict(model.named_parameters())
