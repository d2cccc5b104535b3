"""Models on which a pass over the running graph was wrong once, each against eager."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

import amp_convert as amp
from amp_convert.capture.export_repairs import distinct_casts
from tests.bits import assert_same_bits
from tests.rewrite.kernels.reviewed_net import Net, made


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


# --- casts that give back what they were given ---------------------------------------------------


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


# --- what the caller gets is the caller's --------------------------------------------------------


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


# --- where values lie ----------------------------------------------------------------------------


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
