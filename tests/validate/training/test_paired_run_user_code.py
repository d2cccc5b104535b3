"""What the user's own code does to a race: each arm has to stay a plain loop, or it is said."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError
from amp_convert.validate.training.arm_specs import PAIR
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.recipe import Recipe
from tests.bits import assert_same_bits
from tests.training import POINTS, Net, classify, convert_net, initial_model, points
from tests.validate.training.raced_arms import adamw, convert, raced

NONE = LossScaling("none")


@pytest.mark.slow
def test_an_optimizer_of_some_parameters() -> None:
    """The others get gradients too, which nobody uses, in no arm and at no later step."""

    def head_only(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[-2:], 0.5)

    recipe = Recipe(classify, head_only, clip_norm=0.3)
    exact = raced(convert_net(torch.float16, "fp32"), dataclasses.replace(recipe, scaling=NONE))
    model = initial_model(0).train()
    optimizer = head_only(model.parameters())
    torch.manual_seed(0)
    losses = []
    for _, (args, _, target) in zip(range(6), points(0), strict=False):
        loss = classify(model(*args), target)
        loss.backward()
        nn.utils.clip_grad_norm_(list(model.parameters())[-2:], 0.3)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    state = model.state_dict()
    for arm in exact.arms.values():
        assert arm.losses == losses
        assert_same_bits({name: state[name] for name in arm.tensors}, arm.tensors)
    mixed = raced(convert_net(torch.float16), recipe)
    for name in (spec.name for spec in PAIR):
        assert mixed.arms[name].norms == pytest.approx(exact.arms["fp32"].norms, rel=1e-2)


@pytest.mark.slow
def test_an_optimizer_without_any_gradient() -> None:
    """Nothing reaches its parameters: no step, and no assertion of GradScaler's."""

    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    torch.manual_seed(0)
    converted = convert(Unused(), torch.randn(4, 8), preset="default")
    recipe = Recipe(classify, lambda parameters: torch.optim.SGD([next(iter(parameters))], 0.1))
    data = dataclasses.replace(POINTS, initial_model=None)
    names = [name for name, _ in converted.captured.model.named_parameters()]
    assert names[0] == "spare"
    race = raced(converted, recipe, data, 3)
    assert race.arms["mixed"].norms == [0.0] * 3
    assert race.arms["mixed"].skipped == []


@pytest.mark.slow
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_python_and_numpy(draw: Callable[[], float]) -> None:
    """Each arm has its own, from the seed; drawing others is seen."""

    def noisy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return classify(outputs, target) * draw()

    race = raced(convert_net(torch.float16, "fp32"), Recipe(noisy, adamw, scaling=NONE))
    assert race.random_parted is None
    assert race.arms["fp32"].losses == race.arms["mixed"].losses
    calls = iter(range(100))

    def odd(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:  # FP32 and mixed in turn: the mixed arm at step 2
            draw()
        return classify(outputs, target)

    assert raced(convert_net(torch.float16, "fp32"), Recipe(odd, adamw)).random_parted == 2


def test_eval_batches_from_the_global_random_state_are_the_same_for_all_arms() -> None:
    def drawn() -> Iterator[Batch]:
        x = torch.randn(64, 8)
        yield (x,), {}, (x[:, 0] > 0).long()

    calls = iter(range(100))

    def odd(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(calls) % 2:
            torch.rand(())
        return classify(outputs, target)

    data = dataclasses.replace(POINTS, eval_batches=drawn)
    race = raced(convert_net(torch.float16, "fp32"), Recipe(odd, adamw), data, 1)
    assert race.random_parted == 1
    fp32, mixed = (race.evaluate(race.arms[name]) for name in (spec.name for spec in PAIR))
    assert fp32 == mixed


class Writes(Net):
    """It writes to its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sub_(1.0))


@pytest.mark.slow
def test_eval_batches_that_the_model_or_the_loss_writes_to() -> None:
    kept = [next(points(5))]

    def spoils(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = classify(outputs.clone(), target)
        with torch.no_grad():
            outputs.zero_()
        return value

    torch.manual_seed(0)
    converted = convert(Writes(), torch.randn(4, 8))
    data = dataclasses.replace(POINTS, eval_batches=lambda: iter(kept), initial_model=None)
    race = raced(converted, Recipe(classify, adamw, scaling=NONE), data, 2)
    fp32, mixed = (race.arms[name] for name in (spec.name for spec in PAIR))
    metrics = race.evaluate(fp32)
    assert race.evaluate(mixed) == metrics == race.evaluate(fp32)
    spoilt = raced(converted, Recipe(spoils, adamw, scaling=NONE), data, 2)
    assert spoilt.evaluate(spoilt.arms["fp32"])["accuracy"] == metrics["accuracy"]


def test_a_metric_that_a_batch_does_not_have_is_none_of_the_arms() -> None:
    """A mean over the other batches could look better than FP32's."""
    calls = iter(range(100))

    def patchy(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        return {"always": 0.5} | ({"first": 1.0} if next(calls) % 3 == 0 else {})

    data = dataclasses.replace(POINTS, score=patchy)
    race = raced(convert_net(torch.float16, "fp32"), Recipe(classify, adamw), data, 1)
    assert set(race.evaluate(race.arms["fp32"])) == {"loss", "always"}


def test_eval_batches_without_a_sample() -> None:
    data = dataclasses.replace(POINTS, eval_batches=lambda: iter([((torch.ones(0, 8),), {}, 0)]))
    recipe = Recipe(classify, adamw, path="net.py")
    with pytest.raises(ModelError, match=r"eval_batches\(\) gives no sample \(at net\.py\)"):
        raced(convert_net(torch.float16, "fp32"), recipe, data, 1)
