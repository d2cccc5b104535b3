"""Models on which a pass over the running graph was wrong once, each against eager."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import amp_convert as amp
from amp_convert.capture.export_repairs import distinct_casts
from amp_convert.rewrite.kernels.sizes_alone import KEPT
from tests.benchmarks.dispatch import counted
from tests.rewrite.kernels.running import running, targets
from tests.zoo import assert_same_bits


class Net(nn.Module):
    """A linear layer, a norm, a buffer, and a forward that is given."""

    def __init__(self, forward: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("held", torch.ones(3, width))
        self._forward = forward

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self, *inputs)


def made(forward: Callable[..., Any], width: int = 4) -> Net:
    torch.manual_seed(0)
    return Net(forward, width).eval()


# --- casts that give back what they were given ---------------------------------------------------


def _two_names(m: Net, x: torch.Tensor) -> torch.Tensor:
    h = m.linear(x)
    kept, h = h, h.float()
    h += m.norm(h)
    return kept * h


def _written_after(m: Net, x: torch.Tensor) -> torch.Tensor:
    h = m.linear(x)
    y = h.to(torch.float32)
    y.add_(1)
    return h + y


def _input_written(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = x.to(m.linear.weight.dtype)
    y.mul_(2)
    return m.linear(x)


def _buffer_written(m: Net, x: torch.Tensor) -> torch.Tensor:
    m.held.float().add_(1)
    return m.linear(x) + m.held


@pytest.mark.parametrize("forward", [_two_names, _written_after, _input_written, _buffer_written])
def test_what_is_written_through_a_cast_is_seen_under_its_other_name(
    forward: Callable[..., Any],
) -> None:
    model, x = made(forward), torch.randn(3, 4)
    mixed = amp.convert(made(forward), x.clone(), rules="fp32", train=False)
    with torch.no_grad():
        for _ in range(3):
            mine, theirs = x.clone(), x.clone()
            assert_same_bits(model(mine), mixed(theirs))
            assert_same_bits(mine, theirs)
        assert_same_bits(model.held, mixed.held)


def test_a_copy_that_was_asked_for_is_one() -> None:
    model = made(lambda m, x: (m.linear(x), x.to(torch.float32, copy=True).t()))
    mixed, x = amp.convert(model, torch.randn(3, 4), rules="fp32", train=False), torch.randn(3, 4)
    with torch.no_grad():
        mixed(x)[1].zero_()
    assert bool(x.any())


def test_tensor_methods_are_patched_in_one_thread_and_come_back() -> None:
    seen: list[bool] = []

    def other() -> None:
        x = torch.zeros(2)
        seen.append(x.to(torch.float32) is x)

    with distinct_casts():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.zeros(2).float() is not None
    assert seen == [True]
    x = torch.ones(2)
    assert x.to(torch.float32) is x


@pytest.mark.slow
def test_training_has_words_of_its_own() -> None:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        h = torch.exp(m.linear(x) * 4)
        return h.to(torch.float32 if m.training else m.linear.weight.dtype) - 1.0

    mixed = amp.convert(made(forward), torch.randn(3, 4), dtype=torch.bfloat16)
    casts = [
        [d.dtype for d in plan if d.op == "aten.to"] for plan in (mixed.plan.eval, mixed.plan.train)
    ]
    assert casts == [["bfloat16"], ["float32"]]


# --- what the caller gets is the caller's --------------------------------------------------------


def _joined(m: Net, x: torch.Tensor) -> Any:
    nothing = torch.zeros(0)
    parts = [torch.cat([nothing, each], 0).transpose(0, 1) for each in (x, m.held)]
    return (m.linear(x), *parts)


def _there_and_back(m: Net, x: torch.Tensor) -> Any:
    low = m.held.to(torch.bfloat16)
    return m.linear(x), low.float().to(torch.bfloat16).t(), low.view(-1)


def _computed(m: Net, x: torch.Tensor) -> Any:
    twice = m.held * 2
    return m.linear(x) + twice, twice.t()


@pytest.mark.parametrize("rules", ["fp32", "default"])
@pytest.mark.parametrize("forward", [_joined, _there_and_back, _computed])
def test_writing_to_a_result_changes_nothing_else(forward: Callable[..., Any], rules: str) -> None:
    model, x = made(forward), torch.randn(3, 4)
    mixed = amp.convert(model, x, rules=rules, dtype=torch.bfloat16, train=False)
    for call in (mixed, mixed.freeze()):
        given = x.clone()
        with torch.no_grad():
            want = [t.clone() for t in call(given)]
            for index in range(1, len(want)):
                call(given)[index].fill_(7)
            assert_same_bits(want, list(call(given)))
        assert_same_bits(x, given)
        assert bool((model.held == 1).all())


# --- where values lie ----------------------------------------------------------------------------


def _mixer(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = functional.gelu(m.linear(x.transpose(1, 2)))
    return x + torch.tanh(y.transpose(1, 2))


def _sums(m: Net, x: torch.Tensor) -> Any:
    z = x + torch.tanh(m.linear(x.transpose(1, 2)).transpose(1, 2))
    return z.mean((1, 2)), z.sum(1)


def _along(m: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(m.linear(x.transpose(1, 2)).transpose(1, 2).tanh(), 1)


def _filled(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x.transpose(1, 2)).transpose(1, 2).tanh()
    return y.masked_fill(x > 0, 0.5)


@pytest.mark.parametrize("forward", [_mixer, _sums, _along, _filled])
def test_writes_in_place_leave_every_value_where_it_lay(forward: Callable[..., Any]) -> None:
    model, x = made(forward, 16), torch.randn(3, 16, 12)
    mixed = amp.convert(model, x, rules="fp32", train=False)
    with torch.no_grad():
        want, have = model(x), mixed(x)
    assert_same_bits(want, have)
    pairs = zip(_leaves(want), _leaves(have), strict=True)
    assert all(one.stride() == other.stride() for one, other in pairs)


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    return iter(tree if isinstance(tree, tuple) else (tree,))


# --- custom operators ----------------------------------------------------------------------------


@torch.library.custom_op("amp_convert_tests::noise", mutates_args=())
def _noise(rows: int) -> torch.Tensor:
    return torch.randn(rows)


@_noise.register_fake
def _(rows: int) -> torch.Tensor:
    return torch.empty(rows)


_TABLES: dict[int, torch.Tensor] = {}


@torch.library.custom_op("amp_convert_tests::table", mutates_args=())
def _table(x: torch.Tensor) -> torch.Tensor:
    return _TABLES.setdefault(x.shape[-1], torch.arange(x.shape[-1]).float() + 1)


@_table.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[-1])


@pytest.mark.slow
def test_a_custom_operator_is_not_believed() -> None:
    noisy = made(lambda m, x: m.linear(x) + torch.ops.amp_convert_tests.noise(x.shape[0])[:, None])
    x = torch.randn(3, 4)
    mixed = amp.convert(noisy, x, rules="fp32", train=False)
    with torch.no_grad():
        assert not torch.equal(mixed(x), mixed(x))
    tabled = made(lambda m, x: m.linear(x) + torch.exp(torch.ops.amp_convert_tests.table(x)))
    mixed = amp.convert(tabled, x, rules="fp32", train=False)
    with torch.no_grad():
        want = tabled(x)
        for _ in range(3):
            assert_same_bits(want, mixed(x))


# --- threads, transforms, odd layers, files ------------------------------------------------------


def _by_rows(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.linear(x) + torch.arange(x.shape[0]).float().cos()[:, None]


@pytest.mark.slow
def test_threads_do_not_make_what_is_kept_grow() -> None:
    frozen = amp.convert(made(_by_rows), torch.randn(3, 4), rules="fp32", train=False).freeze()

    def call(offset: int) -> None:
        for turn in range(200):
            frozen(torch.randn(2 + (turn * 7 + offset * 3) % 97, 4))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(running(frozen).tuned.sizes_alone._kept) <= KEPT


def test_a_transformed_call_takes_the_plain_graph() -> None:
    model = made(lambda m, x: torch.relu(m.norm(x)) + m.linear(x))
    mixed, x = amp.convert(model, torch.randn(3, 4), rules="fp32", train=False), torch.randn(3, 4)
    with torch.no_grad():
        stacked = {
            name: torch.stack([value, 2 * value])
            for name, value in mixed.named_parameters()
            if name.startswith("linear")
        }
        run = torch.vmap(lambda given: torch.func.functional_call(mixed, given, (x,)))
        want = torch.vmap(lambda given: torch.func.functional_call(model, given, (x,)))
        torch.testing.assert_close(run(stacked), want(stacked))


@pytest.mark.slow
def test_a_layer_of_no_inputs_and_a_bias_that_is_no_vector_are_not_folded() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Linear(0, 4)
            self.weight, self.bias = (
                nn.Parameter(torch.randn(4, 4)),
                nn.Parameter(torch.randn(5, 4)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weight, self.bias) + self.none(x[..., :0])

    model, x = Odd().eval(), torch.randn(3, 5, 4)
    mixed = amp.convert(model, x, dtype=torch.bfloat16, train=False)
    with torch.no_grad():
        for call in (mixed, mixed.freeze()):
            torch.testing.assert_close(call(x), model(x), rtol=0.05, atol=0.05)


def test_a_file_keeps_the_kernels_and_the_random_numbers() -> None:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(_by_rows(m, x)) + torch.rand(4)

    frozen = amp.convert(made(forward), torch.randn(3, 4), train=False).freeze()
    loaded, x = pickle.loads(pickle.dumps(frozen)), torch.randn(5, 4)
    assert targets(running(loaded).tuned) == targets(running(frozen).tuned)
    with torch.no_grad():
        assert not torch.equal(loaded(x), loaded(x))
        for call in (frozen, loaded):
            torch.manual_seed(3)
            call.result = call(x)
        assert_same_bits(frozen.result, loaded.result)
        assert counted(lambda: loaded(x)).calls == counted(lambda: frozen(x)).calls
