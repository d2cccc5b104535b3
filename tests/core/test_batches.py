"""Batches, and means of the user's metrics over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from amp_convert.core.batches import MetricMeans, batch_size, no_score


@pytest.mark.parametrize(
    ("args", "kwargs", "size"),
    [
        ((torch.zeros(3, 2), torch.zeros(5)), {}, 3),
        ((), {"scale": 2.0, "x": [torch.zeros(4)]}, 4),
        ((torch.tensor(1.0), torch.zeros(6, 1)), {}, 6),
        (("text",), {}, 1),
        ((torch.zeros(0, 3),), {}, 0),
    ],
)
def test_the_size_is_that_of_the_first_tensor(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> None:
    assert batch_size(args, kwargs) == size


def test_means_are_weighted_by_size() -> None:
    means = MetricMeans()
    means.add("fp32", {"error": 2.0}, 4)
    means.add("fp32", {"error": 0.0}, 1)
    means.add("mixed", {"error": 4.0}, 4)
    assert means.of("fp32") == {"error": 8 / 5}
    assert (means.samples("fp32"), means.samples("other")) == (5, 0)
    assert means.value("mixed", "error") == 4.0
    assert math.isnan(means.value("mixed", "accuracy"))
    means.drop("mixed")
    assert means.of("mixed") == {}


def test_a_metric_is_the_mean_of_the_batches_that_give_it() -> None:
    means = MetricMeans()
    for name, value, size in (("recall", 0.5, 2), ("accuracy", 1.0, 6), ("recall", 1.0, 2)):
        means.add("fp32", {name: value, "loss": 3.0}, size)
    assert means.of("fp32") == {"recall": 0.75, "loss": 3.0, "accuracy": 1.0}
    assert means.complete("fp32") == {"loss": 3.0}


def test_without_metrics_there_are_no_means() -> None:
    means = MetricMeans()
    means.add("fp32", no_score(1.0, 1.0), 4)
    assert means.of("fp32") == {}


def test_batches_without_a_sample_have_no_mean() -> None:
    means = MetricMeans()
    means.add("fp32", {"error": 0.0}, 0)
    assert math.isnan(means.value("fp32", "error"))
