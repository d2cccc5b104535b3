"""A sample of `make healthy`: models with nothing wrong pass, end to end, with default settings."""

from __future__ import annotations

import pytest

from tests.benchmarks.healthy import judged
from tests.benchmarks.healthy_models import HEALTHY

SAMPLE = ("digits-mlp", "graph-gat", "recommender-factors")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_healthy_model_passes(name: str) -> None:
    (model,) = (model for model in HEALTHY if model.name == name)
    for result in judged(model):
        assert result.status == "pass", result.why


def test_there_are_enough_of_each_kind() -> None:
    names = [model.name for model in HEALTHY]
    assert len(set(names)) == len(names) >= 24
    for kind in ("digits", "text", "audio", "graph", "table", "recommender"):
        assert sum(name.startswith(kind) for name in names) >= 2
