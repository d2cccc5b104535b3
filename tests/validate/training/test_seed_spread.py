"""The FP32 training baseline: what is measured, what the file holds, and where it is refused."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.validate.training.margin import MarginSource
from amp_convert.validate.training.seed_spread import (
    Conditions,
)
from tests.bits import assert_same_bits
from tests.validate.training.seeded_training import (
    DATA,
    accuracy,
    batches,
    build,
    eval_batches,
    make,
)

HERE = Conditions(digest="d" * 64, device="cpu", steps=3, accumulate=2, clip_norm=0.5, batches=8)


FEW = dataclasses.replace(DATA, train_batches=lambda seed: itertools.islice(batches(seed), 5))


def by_hand(seed: int) -> tuple[nn.Module, list[float]]:
    """The model after three steps of plain PyTorch, and its losses."""
    model = build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stream, losses = batches(seed), []
    torch.manual_seed(seed)
    for _ in range(3):
        both = []
        for _ in range(2):
            (inputs,), _, target = next(stream)
            loss = F.cross_entropy(model(inputs), target)
            (loss / 2).backward()
            both.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(sum(both) / 2)
    return model.eval(), losses


def mean(score: Callable[[torch.Tensor, torch.Tensor], float], model: nn.Module) -> float:
    """Over the eval batches, weighted by their size."""
    rows = [(score(model(inputs), target), len(target)) for (inputs,), _, target in eval_batches()]
    return sum(value * size for value, size in rows) / sum(size for _, size in rows)


@pytest.mark.parametrize("metric", [None, "margin", "loss", "train_loss"])
def test_the_values_are_those_of_plain_training(metric: str | None) -> None:
    made = make(metric=metric, lower_is_better=frozenset({"margin"}))
    assert made.seeds == (1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007)
    expected = []
    for seed in made.seeds:
        model, losses = by_hand(seed)
        with torch.no_grad():
            scores = {
                "margin": mean(lambda out, target: accuracy(out, target)["margin"], model),
                "loss": mean(lambda out, target: F.cross_entropy(out, target).item(), model),
                "train_loss": losses[-1],  # the last quarter of three steps
            }
        expected.append(scores[metric or "margin"])
    assert made.values == pytest.approx(expected, rel=1e-12)
    assert len(set(made.values)) == 8
    assert (made.metric, made.lower_is_better) == (metric or "margin", True)
    assert (made.model, made.conditions) == ("net", HERE)


def test_higher_is_better_unless_it_is_said() -> None:
    assert make(metric="margin").lower_is_better is False


@pytest.mark.slow
def test_more_seeds_and_a_tick_a_step() -> None:
    ticks: list[int] = []
    made = make(seeds=9, tick=lambda: ticks.append(1))
    assert (len(ticks), made.seeds[-1], len(made.values)) == (27, 1008, 9)
    assert made.values[:8] == make().values


def test_the_margin_is_one_and_a_half_standard_deviations() -> None:
    made = make()
    margin = made.margin_for(HERE, None, ())
    assert margin.value == pytest.approx(1.5 * statistics.stdev(made.values))
    assert (margin.source, margin.seeds) == (MarginSource.BASELINE, 8)
    assert made.summary == (
        f"margin {statistics.mean(made.values):.6g} ± {statistics.stdev(made.values):.3g} over 8 "
        f"seeds of 3 steps; margin {margin.value:.3g}"
    )


def test_the_model_and_the_random_state_are_afterwards_as_they_were() -> None:
    model = build(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    make(model=model)
    assert_same_bits(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"seeds": 7},
            UsageError,
            "7 FP32 seeds were asked for; a margin needs at least 8. Give --seeds 8 or more.",
        ),
        (
            {"metric": "constant"},
            UsageError,
            "the metric of the FP32 seeds is 1 for each of its 8 seeds. "
            "That gives no margin: give a tolerance instead.",
        ),
        (
            {"metric": "f1"},
            UsageError,
            "the model file has no metric f1. There are: loss, margin, constant, train_loss.",
        ),
        (
            {"data": FEW},
            ModelError,
            "train_batches(1000) has batches for 2 of 3 steps only. "
            "Let it give more, or give --steps 2.",
        ),
    ],
)
def test_what_gives_no_baseline(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        make(**options)
    assert str(caught.value) == message
