"""Random states: taken, put back, compared."""

from __future__ import annotations

import torch

from amp_convert.core.random_state import preserved_rng, rng_state, set_rng_state


def test_random_state() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    with preserved_rng(cpu):
        first = torch.rand(3)
        state = rng_state(cpu)
        second = torch.rand(3)
        set_rng_state(cpu, state)
        assert torch.equal(torch.rand(3), second)
    assert torch.equal(torch.rand(3), first)
