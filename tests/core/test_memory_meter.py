"""Peaks worked out by hand, of code whose storages are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.core.memory_meter import StorageMeter, peak_bytes


def chain() -> None:
    a = torch.ones(1000)
    b = a + 1
    del a
    c = b * 2
    del b
    c.view(10, 100).t()[2:].mul_(2)


def two_results() -> None:
    torch.ones(10, 100).max(dim=0)


def freed_between() -> None:
    for _ in range(5):
        torch.ones(1000).exp()


OUTSIDE = torch.ones(1000)


BACKWARD = nn.Sequential(*[nn.Linear(100, 100) for _ in range(3)]).requires_grad_(True)


ROWS = torch.ones(1000, 100)


PEAKS: dict[str, tuple[Callable[[], Any], int]] = {
    "nothing": (lambda: None, 0),
    "one": (lambda: torch.ones(1000), 4000),
    "an integer and a bit": (lambda: (torch.ones(10, dtype=torch.int64), torch.zeros(3) > 0), 95),
    "a view of what was there": (lambda: OUTSIDE.view(10, 100).t(), 0),
    "in place on what was there": (lambda: OUTSIDE.mul_(1), 0),
    "two at a time": (chain, 8000),
    "freed between": (freed_between, 8000),
    "a tuple": (two_results, 4000 + 400 + 800),
    "without gradients": (torch.no_grad()(lambda: BACKWARD(ROWS)), 2 * 400_000),
    "saved for backward": (lambda: BACKWARD(ROWS), 3 * 400_000),
}


@pytest.mark.parametrize("case", PEAKS)
def test_peak_bytes(case: str) -> None:
    function, expected = PEAKS[case]
    assert peak_bytes(function) == expected


def test_the_meter_follows_what_lives_on() -> None:
    kept = []
    with StorageMeter() as meter:
        kept.append(torch.ones(100))
        assert meter.live == 400
        kept.append(kept[0].view(10, 10))
        assert meter.live == 400
        del kept[0]
        assert meter.live == 400, "the view keeps the storage alive"
        kept.clear()
        assert meter.live == 0
        torch.ones(50)
    assert (meter.live, meter.peak) == (0, 400)


def test_meta_tensors_count_as_if_they_were_there() -> None:
    assert peak_bytes(lambda: torch.ones(1000, device="meta")) == 4000
