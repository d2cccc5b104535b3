"""Code that calls more, less or otherwise than was traced: what a guard keeps in FP32 stays there.
Each case was found by a reviewer; FP32 is the oracle, and FP16 overflows where the plan is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import amp_convert as amp
from amp_convert.core.errors import UsageError

X = torch.linspace(-2, 2, 64).reshape(4, 16)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def small(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T / 16

    def large(self, x: torch.Tensor) -> torch.Tensor:
        wide = x * 300.0
        product = wide @ wide.T  # beyond FP16
        return product / product.abs().amax()


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())


class Method(Base):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.a(x))
        mean = self.small(hidden).mean()
        return self.large(self.norm(self.b(hidden))) + mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)

    def run(self, x: torch.Tensor, times: int) -> torch.Tensor:
        return torch.stack([self.forward(x) for _ in range(times)])


class Dead(Base):
    def forward(self, x: torch.Tensor, *, skip: bool = False) -> torch.Tensor:
        hidden = self.norm(self.a(x))
        hidden @ hidden.T  # is not in the graph
        mean = torch.zeros(()) if skip else self.small(hidden).mean()
        return self.large(hidden) + mean


class Loop(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for step in range(x.shape[1]):
            total = total + self.large(self.norm(self.a(x[:, step])))
        return total


def test_a_method_runs_as_planned_however_often_it_calls() -> None:
    model = made(Method)
    mixed = amp.convert(model, X, train=False)
    with torch.no_grad():
        assert error(mixed.encode(X), model(X)) < 2e-3
        assert error(mixed.run(X, 3), model.run(X, 3)) < 2e-3


@pytest.mark.parametrize("skip", [False, True])
def test_dead_code_and_branches_move_no_precision(skip: bool) -> None:
    model = made(Dead)
    mixed = amp.convert(model, X, train=False)
    with torch.no_grad():
        want = model(X, skip=skip)
        assert error(mixed(X, skip=skip), want) < 2e-3  # of other constants than were captured
        with mixed.plan.autocast(model):
            assert error(model(X, skip=skip), want) < 2e-3


def test_without_lines_what_is_not_told_apart_stays_fp32(tmp_path: Path) -> None:
    """As in a plan whose code has moved."""
    model = made(Dead)
    text = amp.convert(model, X, train=False).plan.to_toml()
    file = tmp_path / "plan.toml"
    file.write_text("\n".join(x for x in text.splitlines() if not x.startswith("location")))
    with torch.no_grad(), amp.autocast(file, model):
        found = model(X)
    with torch.no_grad():
        assert error(found, model(X)) < 2e-3


def test_more_turns_of_a_loop_than_were_traced() -> None:
    model = made(Loop)
    mixed = amp.convert(model, torch.randn(4, 2, 16), train=False)
    longer = torch.randn(4, 5, 16)
    with torch.no_grad():
        assert error(mixed(longer), model(longer)) < 2e-3
        with mixed.plan.autocast(model) as applied:
            model(longer)
    assert applied.counts.unplanned


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def fit(self, x: torch.Tensor) -> list[float]:
        optimizer = torch.optim.SGD([self.weight], 0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.linear(x, self.weight).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def test_a_method_that_trains_sees_its_own_steps() -> None:
    assert made(Trained).fit(X) == pytest.approx(amp.convert(made(Trained), X).fit(X), rel=1e-2)


class OwnBfloat(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", (torch.randn(16, 16) * 1e5).bfloat16())

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x), self.table @ self.table


def test_the_models_own_bfloat16_is_left_alone() -> None:
    model = made(OwnBfloat)
    mixed = amp.convert(model, X, train=False)
    with torch.no_grad():
        with mixed.plan.autocast(model):
            _, found = model(X)
        assert torch.equal(found, model(X)[1])
        assert found.dtype is torch.bfloat16


class Checkpointed(Base):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.Sequential(self.b, nn.GELU())
        return checkpoint.checkpoint(inner, self.a(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_anew_under_the_plan(reentrant: bool) -> None:
    model = made(Checkpointed).train()
    model.reentrant = False
    plan = amp.convert(model, X).plan
    model.reentrant = reentrant

    def grads(call: Callable[[], None]) -> torch.Tensor:
        model.zero_grad()
        call()
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(found)

    def planned() -> None:
        with plan.autocast(model):
            model(X).pow(2).sum().backward()

    want = grads(lambda: model(X).pow(2).sum().backward())
    assert 0 < error(grads(planned), want) < 1e-2


class InPlaceMask(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.a(x) @ self.b(x).T / 16
        scores.masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), -1e9)
        return scores.softmax(-1) @ x


class Scattered(Base):
    """As mixtures of experts collect their results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, out = torch.tensor([2, 0, 1, 3]), torch.zeros(4, 16)
        out.index_add_(0, rows, self.a(x))
        out[rows] = self.b(x) + out[rows]
        out.scatter_add_(0, rows[:, None].expand(4, 16), self.a(x))
        out.lerp_(self.b(x), 0.5)
        torch.softmax(self.a(x), 1, out=torch.empty(4, 16))
        return out


@pytest.mark.parametrize("kind", [InPlaceMask, Scattered])
def test_what_writes_in_place_gets_the_dtype_of_what_it_writes_to(kind: type[nn.Module]) -> None:
    model = made(kind)
    mixed = amp.convert(model, X, train=False)
    with torch.no_grad():
        want = model(X)
        with mixed.plan.autocast(model):
            assert error(model(X), want) < 2e-3


def test_a_number_beyond_the_range_is_no_other_number() -> None:
    """It overflows, as it does under autocast: a wrong finite value would not be seen."""
    plan = amp.convert(made(Streaming), X, train=False).plan
    with torch.no_grad(), plan.autocast():
        ones = X.half().abs() + 1
        assert (ones * 1e6).isinf().all()
        assert (ones + 1e6).isinf().all()
        assert (ones.masked_fill(ones > 0, -1e9) == -torch.finfo(torch.float16).max / 2).all()
        assert ones.masked_fill(ones > 0, -torch.inf).isinf().all()


class Streaming(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)

    def stream(self, x: torch.Tensor) -> Iterator[Any]:
        heard = yield self.a(x)
        yield heard
        return self.b(x)

    def configured(self) -> Streaming:
        return self


def test_generators_and_methods_that_give_the_model_itself() -> None:
    model = made(Streaming)
    mixed = amp.convert(model, X, train=False)
    assert mixed.configured() is mixed

    def through() -> Iterator[Any]:
        returned = yield from mixed.stream(X)
        yield returned

    with torch.no_grad():
        steps = through()
        assert 0 < error(next(steps), model.a(X)) < 2e-3
        assert steps.send("heard") == "heard"
        assert 0 < error(next(steps), model.b(X)) < 2e-3

        @mixed.plan.autocast(model)
        def decorated() -> Iterator[torch.Tensor]:
            yield model.a(X)

        assert 0 < error(next(decorated()).float(), model.a(X)) < 2e-3
    with pytest.raises(UsageError, match="is asynchronous"):

        @mixed.plan.autocast(model)
        async def later() -> None: ...


class Windowed(Base):
    """Its graph holds for one length alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.shape[1] > 8 else self.b(x)


def test_calibration_of_a_size_that_the_graph_does_not_take_is_left_out(caplog: Any) -> None:
    short, long = torch.randn(2, 6, 16), torch.randn(2, 9, 16)
    mixed = amp.convert(made(Windowed), short, calibration=[short, long], train=False)
    assert "a batch of calibration is left out" in caplog.text
    with torch.no_grad():
        for x in (short, long):
            assert error(mixed(x), made(Windowed)(x)) < 2e-3
