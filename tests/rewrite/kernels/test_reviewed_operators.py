"""What a reviewer found: custom operators, threads, transforms, odd layers, files."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import amp_convert as amp
from amp_convert.rewrite.kernels.sizes_alone import KEPT
from tests.benchmarks.dispatch import counted
from tests.bits import assert_same_bits
from tests.rewrite.kernels.reviewed_net import Net, made
from tests.rewrite.kernels.running import running, targets


@torch.library.custom_op("amp_convert_tests::noise", mutates_args=())
def _noise(rows: int) -> torch.Tensor:
    return torch.randn(rows)


# --- custom operators ----------------------------------------------------------------------------


@_noise.register_fake
def _(rows: int) -> torch.Tensor:
    return torch.empty(rows)


_TABLES: dict[int, torch.Tensor] = {}


@torch.library.custom_op("amp_convert_tests::table", mutates_args=())
def table(x: torch.Tensor) -> torch.Tensor:
    return _TABLES.setdefault(x.shape[-1], torch.arange(x.shape[-1]).float() + 1)


@table.register_fake
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


def _by_rows(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.linear(x) + torch.arange(x.shape[0]).float().cos()[:, None]


# --- threads, transforms, odd layers, files ------------------------------------------------------


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
