"""Multiply-adds against the formulas one writes on paper."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.mac_counter import MacCounter
from amp_convert.capture.regions import capture

aten = torch.ops.aten


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def counts(model: nn.Module, *shapes: tuple[int, ...], device: str = "cpu") -> dict[str, int]:
    """Multiply-adds by operator, of those that have any."""
    with torch.device(device):
        region = capture(model.to(device), tuple(torch.ones(s) for s in shapes), {}).regions[0]
    nodes = region.graphs["eval"].nodes
    found = region.traces["eval"].macs
    return {nodes[name].short_op: count for name, count in found.items() if count}


CASES: dict[str, tuple[nn.Module, list[tuple[int, ...]], dict[str, int]]] = {
    "linear": (nn.Linear(7, 5), [(2, 3, 7)], {"aten.linear": 6 * 7 * 5}),
    "linear without bias": (nn.Linear(7, 5, bias=False), [(6, 7)], {"aten.linear": 6 * 7 * 5}),
    "matmul": (Call(torch.matmul), [(4, 3, 7), (4, 7, 2)], {"aten.matmul": 4 * 3 * 7 * 2}),
    "conv2d": (nn.Conv2d(3, 8, 3), [(2, 3, 6, 5)], {"aten.conv2d": 2 * 8 * 4 * 3 * 3 * 9}),
    "grouped conv1d": (
        nn.Conv1d(8, 8, 4, groups=4, stride=2),
        [(2, 8, 10)],
        {"aten.conv1d": 2 * 8 * 4 * 2 * 4},
    ),
    "attention": (
        Call(nn.functional.scaled_dot_product_attention),
        [(2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8)],
        {"aten.scaled_dot_product_attention": 2 * 3 * (5 * 8 * 6 + 5 * 6 * 8)},
    ),
    "lstm": (
        nn.LSTM(6, 8, num_layers=2),
        [(5, 3, 6)],
        {"aten.lstm": 5 * 3 * 4 * 8 * ((6 + 8) + (8 + 8))},
    ),
    "lstm both ways": (
        nn.LSTM(6, 8, bidirectional=True, batch_first=True),
        [(3, 5, 6)],
        {"aten.lstm": 2 * 5 * 3 * 4 * 8 * (6 + 8)},
    ),
    "no products": (Call(lambda x: x.exp().softmax(0).sum() * 3), [(4,)], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts(case: str, device: str) -> None:
    model, shapes, expected = CASES[case]
    if device == "meta":
        with torch.device("meta"):
            model = copy.deepcopy(model)
    assert counts(model, *shapes, device=device) == expected


def test_each_run_counts_for_itself() -> None:
    counter, a, b = MacCounter(), torch.ones(2, 3), torch.ones(3, 4)
    for _ in range(2):
        result, count = counter.run(lambda: torch.mm(a, b), aten.mm.default)
        assert torch.equal(result, torch.full((2, 4), 3.0))
        assert count == 24
    _, count = counter.run(lambda: a.exp(), aten.exp.default)
    assert count == 0


def test_what_is_no_aten_operator_is_run_and_counts_as_none() -> None:
    result, count = MacCounter().run(lambda: (1, 2)[0], operator.getitem)
    assert (result, count) == (1, 0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    counts(nn.Linear(3, 4), (2, 3))
    assert capsys.readouterr().out == ""
