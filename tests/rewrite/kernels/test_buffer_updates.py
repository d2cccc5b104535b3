"""Statistics and counts are written where they are, as eager does, and where that cannot be seen to
be right they are written back after the call."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import amp_convert as amp
from amp_convert.capture.graph_signature import InputSpec, Source
from amp_convert.rewrite.kernels import buffer_updates
from tests.benchmarks.dispatch import counted
from tests.bits import assert_same_bits
from tests.rewrite.kernels.running import running, targets
from tests.zoo import both_dtypes

aten = torch.ops.aten


class Norms(nn.Module):
    """Two BatchNorms, and what else is done with the statistics of the first."""

    def __init__(self, then: Callable[[Norms, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self._then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._then(self, self.norm(self.conv(x)))


def _reads_before(model: Norms, y: torch.Tensor) -> torch.Tensor:
    return y + model.other.running_mean.sum() + model.other(y)


def _reads_after(model: Norms, y: torch.Tensor) -> torch.Tensor:
    return y * model.norm.running_var.sum()


def _returns(model: Norms, y: torch.Tensor) -> torch.Tensor:
    return model.norm.running_mean.clone() + y.mean()


CASES: dict[str, tuple[Callable[[Norms, torch.Tensor], torch.Tensor], int]] = {
    # what follows, and how many BatchNorms keep the trace's form
    "nothing": (lambda m, y: m.other(y), 0),
    "called twice": (lambda m, y: m.other(m.norm(y)), 0),
    "read before": (_reads_before, 1),
    "read after": (_reads_after, 1),
    "returned": (_returns, 1),
    "result unused": (lambda m, y: y + 0 * m.other(y).detach().sum(), 0),
}


def _run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Two steps: outputs, gradients, and the buffers afterwards."""
    found = []
    for _ in range(2):
        made = model(x)
        made.square().sum().backward()
        found.append(made.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [*found, *(b.clone() for b in model.buffers())]


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_buffers_are_those_of_eager(what: str) -> None:
    then, left = CASES[what]
    torch.manual_seed(0)
    model, x = Norms(then).train(), torch.randn(5, 3, 6, 6)
    mixed = amp.convert(copy.deepcopy(model), x, rules="fp32")
    assert_same_bits(_run(model, x), _run(mixed, x))
    called = targets(running(mixed, "train").tuned)
    assert called.count("_native_batch_norm_legit_functional") == left
    assert called.count("batch_norm") >= 1 - left


@pytest.mark.parametrize("read_again", [False, True])
def test_an_old_version_that_is_read_later_is_kept(read_again: bool) -> None:
    """No trace has this order of calls, but a pass might make it: then nothing is written over."""
    graph = fx.Graph()
    names = ("x", "mean", "variance")
    x, mean, variance = (graph.placeholder(name) for name in names)
    norm = graph.call_function(
        aten._native_batch_norm_legit_functional.default,
        (x, None, None, mean, variance, True, 0.1, 1e-5),
    )
    made, *new = (graph.call_function(operator.getitem, (norm, i)) for i in (0, 3, 4))
    if read_again:
        made = graph.call_function(aten.add.Tensor, (made, mean))
    graph.output((*new, made))
    sources = (Source.USER, Source.BUFFER, Source.BUFFER)
    placeholders = {
        node: InputSpec(source, str(node.target), mutated=source is Source.BUFFER)
        for node, source in zip((x, mean, variance), sources, strict=True)
    }
    written = buffer_updates.write(graph, placeholders, names[1:])
    assert written == (frozenset() if read_again else {1, 2})


@pytest.mark.slow
@both_dtypes
def test_a_training_step_copies_no_buffer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    x = torch.randn(5, 3, 6, 6)
    mixed = amp.convert(model, x, dtype=dtype)
    calls = counted(lambda: mixed(x)).calls
    eager = counted(lambda: model(x)).calls
    assert not calls["clone"] + calls["copy_"] + calls["_native_batch_norm_legit_functional"]
    assert calls["native_batch_norm"] == eager["native_batch_norm"] == 1
    assert calls["relu_"] == 1


def test_a_norm_that_is_frozen_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    model[1].eval()
    x = torch.randn(5, 3, 6, 6)
    mixed = amp.convert(copy.deepcopy(model), x, rules="fp32")
    names = targets(running(mixed, "train").tuned)
    assert "batch_norm" in names
    assert "_native_batch_norm_legit_no_training" not in names
    assert_same_bits(_run(model, x), _run(mixed, x))


def test_one_value_a_channel_is_refused_as_eager_refuses_it() -> None:
    """Its variance is 0 of 0: it would make the running one NaN, in silence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    mixed = amp.convert(copy.deepcopy(model), torch.randn(6, 4), dtype=torch.bfloat16)
    said = []
    for call in (model, mixed):
        with pytest.raises(ValueError, match="more than 1 value per channel") as refused:
            call(torch.randn(1, 4))
        said.append(str(refused.value))
        assert all(bool(b.isfinite().all()) for b in call.buffers())
    assert said[0] == said[1]


@pytest.mark.slow
def test_what_is_not_known_is_written_back() -> None:
    """A moving average in floating point: its new value is copied after the call."""

    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
            self.seen.add_(2)
            return y - self.mean

    torch.manual_seed(0)
    model, x = Average().train(), torch.randn(3, 4)
    mixed = amp.convert(copy.deepcopy(model), x, rules="fp32")
    assert_same_bits(_run(model, x), _run(mixed, x))
    names = [running(mixed, "train")._signature.inputs[i].target for i in _written(mixed)]
    assert names == ["seen"]


@pytest.mark.slow
def test_a_flag_that_is_counted_up_is_written_back() -> None:
    """Its sum with a number is no flag, so it cannot be written in place."""

    class Flag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("called", torch.zeros((), dtype=torch.bool))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.called.copy_(self.called + 1)
            return self.linear(x)

    model, x = Flag().train(), torch.randn(3, 4)
    mixed = amp.convert(model, x, rules="fp32")
    assert not _written(mixed)
    mixed(x)
    assert bool(model.called)


def _written(mixed: nn.Module) -> list[int]:
    return sorted(running(mixed, "train").in_place)


@pytest.mark.slow
def test_compiled_the_graph_runs_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    x = torch.randn(6, 4)
    mixed = amp.convert(copy.deepcopy(model), x, rules="fp32")
    compiled = torch.compile(mixed, backend="eager")
    want = model(x)
    assert_same_bits([want, *model.buffers()], [compiled(x), *mixed.buffers()])


@pytest.mark.slow
def test_a_copy_and_a_buffer_that_was_loaded() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(6, 4)
    mixed = amp.convert(model, x, rules="fp32")
    other = copy.deepcopy(mixed)
    other(x)
    assert int(other.get_submodule("1").num_batches_tracked) == 1
    assert int(mixed.get_submodule("1").num_batches_tracked) == 0
    mixed.load_state_dict(other.state_dict())
    mixed(x)
    assert int(mixed.get_submodule("1").num_batches_tracked) == 2
    assert int(other.get_submodule("1").num_batches_tracked) == 1
