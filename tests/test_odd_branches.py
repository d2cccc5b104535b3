"""Models with branches, loops, splits and calls of odd kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import ModelError
from tests.odd_models import Stateful


class Switch(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: -v, (self.layer(x),))
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_conditional_trains() -> None:
    """PyTorch compiles it where it runs, and refuses to for ever after it was watched once."""

    def batches(seed: int) -> Iterator[Any]:
        for i in range(20):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1000 * seed + i))
            yield x, x.flip(1)

    torch.manual_seed(0)
    model = Switch().eval()
    run = amp.check(model, next(batches(0))[0], train_batches=batches, loss=F.mse_loss)
    assert run.report.training.run.steps == 20  # type: ignore[union-attr]
    assert not [check for check in run.verdict.checks if check.status == "fail"]
    model(torch.randn(16, 16)).sum().backward()


class EitherLayer(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h = x.relu()
        y = torch.cond(x.mean() > 0, lambda v: self.layer(v), lambda v: self.last(v).log(), (h,))
        return y.tanh()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("low", [-1.0, 1.0], ids=["both", "one"])
def test_a_branch_that_no_batch_takes_is_named(low: float) -> None:
    """Outputs and metrics know nothing of it, so nobody can call it as good as FP32's. What it
    would compute on the others' values, here the logarithm of negative ones, is no evidence."""
    torch.manual_seed(0)
    model = EitherLayer().eval()
    with torch.no_grad():
        model.last.bias.fill_(4.0)
    batches = [(torch.rand(32, 16) * 9 + 1, None), (low * torch.rand(32, 16) * 9 + low, None)]
    run = amp.check(model, batches[0][0], eval_batches=batches)
    nodes = next(check for check in run.verdict.checks if check.name == "nodes.finite")
    if low < 0:
        assert nodes.status == "pass"
        assert run.verdict.status == "pass"
    else:
        assert run.verdict.status == "inconclusive"
        assert nodes.status == "unchecked"
        assert "first last/aten.linear#0: give some early that reach them" in nodes.reason


class Guarded(Stateful):
    """Its branches raise, or have no gradients, on the values of each other."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cond(
            x.min() > 0,
            lambda v: self.layer(v.sqrt() + torch.linalg.cholesky(torch.diag(v[0]))[0]),
            lambda v: self.layer(v) * 2,
            (x,),
        )
        return self.last(h.tanh())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_guarded_operation_is_judged_where_it_runs() -> None:
    def batches(seed: int) -> Iterator[Any]:
        for i in range(20):
            g = torch.Generator().manual_seed(1000 * seed + i)
            x = (torch.rand(16, 16, generator=g) + 0.1) * (1 if i % 2 else -1)
            yield x, x.flip(1)

    torch.manual_seed(0)
    evals = list(batches(7))[:4]
    run = amp.check(
        Guarded().eval(), evals[1][0], dtype=torch.bfloat16, eval_batches=evals,
        train_batches=batches, loss=F.mse_loss,
    )  # fmt: skip
    assert not [check for check in run.verdict.checks if check.status == "fail"]
    nodes = next(check for check in run.verdict.checks if check.name == "nodes.finite")
    assert nodes.status == "pass"


class Exploding(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.cond(x.sum() > 0, lambda v: self.last(v), lambda v: (v * 30).exp(), (h,))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_branch_in_fp32_that_no_batch_takes_is_named_as_well() -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 16)
    run = amp.check(Exploding().eval(), x, eval_batches=[(x, None), (x * 2, None)])
    assert run.verdict.status == "inconclusive"


class NeedsGradients(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.last(self.layer(x)).square().sum(), x)[0]


def test_gradients_in_the_forward_pass_without_asking_for_them() -> None:
    """It runs in eager mode, and not under no_grad: the inputs are not to blame."""
    with pytest.raises(ModelError, match="computes gradients in its forward pass, and inference"):
        amp.check(NeedsGradients().eval(), torch.randn(16, 16))


class Split(nn.Module):
    """Two splits of one operator into other numbers of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.three = nn.Linear(16, 32), nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.two(x).chunk(2, 1)
        q, k, v = self.three(a + b).chunk(3, 1)
        return q + k + v  # type: ignore[no-any-return]


@pytest.mark.slow
def test_splits_into_other_numbers_of_parts() -> None:
    torch.manual_seed(0)
    assert amp.convert(Split().eval(), torch.randn(8, 16), train=False).plan.share_macs_low() == 1.0


class Repeats(nn.Module):
    """One part, called as often as its values ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            if x.norm() < 1e-3:
                break
            x = x - 0.1 * self.step(x)
        return x


@pytest.mark.slow
def test_the_work_of_a_part_is_that_of_all_its_calls() -> None:
    torch.manual_seed(0)
    plan = amp.convert(Repeats().eval(), torch.randn(16, 32), train=False).plan
    assert plan.eager_macs == 0
    assert plan.share_macs_low() == 1.0
    assert plan.total_macs() == 20 * 16 * 32 * 32


@pytest.mark.slow
def test_targets_may_be_gradients() -> None:
    def batches() -> Iterator[Any]:
        for _ in range(2):
            x = torch.randn(16, 16, requires_grad=True)
            yield x.detach(), torch.autograd.grad(x.square().sum(), x)[0]

    torch.manual_seed(0)
    run = amp.check(nn.Linear(16, 16).eval(), torch.randn(16, 16), eval_batches=batches)
    assert run.verdict.status == "pass"


class EmptyCache(nn.Module):
    """A decoder that joins its input to a cache, which is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        cache = torch.tensor([])
        return self.last(torch.cat([cache, self.layer(x)]))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_nodes_that_are_empty_for_any_input_are_no_gap() -> None:
    torch.manual_seed(0)
    run = amp.check(EmptyCache().eval(), torch.randn(16, 16))
    assert run.verdict.status == "pass"


class Tokens(Stateful):
    """Goes on from the mean of all tokens that it has seen; refuses those above a bound first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16)

    def forward(self, ids: Tensor) -> Tensor:
        if int(ids[0, 0]) != 1:
            raise ValueError("a sequence starts with 1")
        seen = self.table(ids).mean(1)
        self.state = seen.detach() if self.state is None else (seen + self.state).detach()
        return self.last(self.layer(self.state))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_state_is_seen_where_a_model_refuses_other_inputs() -> None:
    torch.manual_seed(0)
    converted = amp.convert(Tokens().eval(), torch.tensor([[1, 4, 7, 2]]), train=False)
    assert not converted.captured.is_whole
    assert "state changes what the next call gives" in converted.captured.uncaptured[0].reason


class Converges(nn.Module):
    """Ends at other iterations in FP16; behind the loop comes a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        nn.init.orthogonal_(self.step.weight, gain=0.7)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            new = torch.tanh(self.step(z) + x)
            moved, z = (new - z).norm() / new.norm(), new
            if moved < 1e-4:
                break
        return self.head(z)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_what_lies_behind_a_loop_that_ends_elsewhere_is_judged_by_the_outputs() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 32), None) for _ in range(4)]
    run = amp.check(Converges().eval(), torch.randn(16, 32), eval_batches=batches)
    checks = {check.name: check for check in run.verdict.checks}
    assert run.report.inference.parted_paths == 4
    assert run.report.inference.behind_parting == ("head/aten.linear#0",)
    assert (checks["nodes.finite"].status, checks["nodes.finite"].required) == ("unchecked", False)
    assert run.verdict.status == "pass"
