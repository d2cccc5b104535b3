"""A metric that keeps state, or does not look at the outputs, is told from one that judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amp_convert.validate.inference.metric_probe import BATCHES, MetricProbe
from amp_convert.validate.inference.results import MetricDoubt

X = torch.linspace(-2, 2, 24).reshape(8, 3)
LABELS = X.argmax(1)


class Counter:
    calls = 0

    def __call__(self, outputs: Any, target: Any) -> dict[str, float]:
        self.calls += 1
        return {"n": self.calls + float(outputs.sum())}


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"n": float((outputs.argmax(1) == target).float().mean())}


def refuses(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    assert float(outputs.sum()) >= 0
    assert not torch.equal(outputs, torch.zeros_like(outputs))
    return {"n": 1.0}


@pytest.mark.parametrize(
    ("score", "doubt"),
    [
        (accuracy, None),
        (lambda o, t: {"n": float("nan") if (o == 0).all() else 1.0}, None),
        (refuses, None),
        (lambda o, t: {"n": 0.98}, MetricDoubt.CONSTANT),
        (lambda o, t: {"n": float("nan")}, MetricDoubt.CONSTANT),
        (lambda o, t: {"n": float(t.sum())}, MetricDoubt.CONSTANT),
        (Counter(), MetricDoubt.STATEFUL),
        (lambda o, t: {"n": float(torch.rand(()))}, MetricDoubt.STATEFUL),
    ],
    ids=["looks", "nan", "refuses", "number", "always-nan", "target", "counts", "draws"],
)
def test_what_a_metric_looks_at(score: Any, doubt: MetricDoubt | None) -> None:
    probe = MetricProbe(score)
    for _ in range(BATCHES + 1):
        probe.try_batch(X + 2.5, LABELS)
    assert probe.doubt("n") is doubt


def test_a_metric_that_came_later_is_not_doubted() -> None:
    probe = MetricProbe(lambda o, t: {})
    probe.try_batch(X, LABELS)
    assert probe.doubt("n") is None


def test_it_stops_asking() -> None:
    counter = Counter()
    probe = MetricProbe(counter)
    for _ in range(10):
        probe.try_batch(X, LABELS)
    assert counter.calls <= 4 * BATCHES


def test_integers_and_booleans_are_turned_too() -> None:
    for outputs in (torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])):
        probe = MetricProbe(lambda o, t: {"n": float((o == t).float().mean())})
        probe.try_batch(outputs, outputs)
        assert probe.doubt("n") is None
