"""One arm, with every optimizer and kind of schedule that PyTorch has, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler as schedules

from amp_convert.core.errors import ModelError
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training.arm_specs import PAIR
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training
from tests.bits import assert_same_bits
from tests.training import POINTS, Net, classify, convert_net, initial_model, points

Optimizer = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "adamw-fused": lambda p: optim.AdamW(p, 1e-2, fused=True),
    "adamw-loop": lambda p: optim.AdamW(p, 1e-2, foreach=False),
    "adadelta": lambda p: optim.Adadelta(p),
    "adafactor": lambda p: optim.Adafactor(p),
    "adagrad": lambda p: optim.Adagrad(p),
    "adamax": lambda p: optim.Adamax(p),
    "asgd": lambda p: optim.ASGD(p),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "rmsprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: optim.Rprop(p),
    "groups": lambda p: optim.SGD(
        [{"params": ps, "lr": 0.1 / len(ps)} for ps in _halves(list(p))], momentum=0.9
    ),
}
# SparseAdam takes sparse gradients, Muon matrices only; LBFGS, which has a test of its own, needs
# to evaluate the loss again, and nobody may do that under a GradScaler.
ELSEWHERE = {"SparseAdam", "Muon", "LBFGS"}
SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: schedules.StepLR(o, 2),
    "lambda": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one-cycle": lambda o: schedules.OneCycleLR(o, 0.1, 8),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.9)], [3]
    ),
}


def _halves(parameters: list[Any]) -> list[list[Any]]:
    return [parameters[:2], parameters[2:]]


def plain(optimizer: Optimizer, schedule: Any, steps: int) -> tuple[list[float], Net]:
    """The plain FP32 loop."""
    model = initial_model(0).train()
    update = optimizer(model.parameters())
    follow = schedule(update) if schedule else None
    losses = []
    torch.manual_seed(0)
    for _, (args, _, target) in zip(range(steps), points(0), strict=False):
        loss = classify(model(*args), target)
        loss.backward()
        update.step()
        if isinstance(follow, schedules.ReduceLROnPlateau):
            follow.step(loss.item())
        elif follow is not None:
            follow.step()
        update.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.fixture(scope="module")
def exact() -> Any:
    return convert_net(torch.float16, "fp32")


def test_the_list_is_whole() -> None:
    """A new optimizer of PyTorch's shows here."""
    kinds = {
        name
        for name, kind in vars(optim).items()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind.__module__
    } - {"Optimizer"}
    tried = {type(make(Net().parameters())).__name__ for make in OPTIMIZERS.values()}
    assert kinds - tried == ELSEWHERE & kinds


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [*((name, None) for name in OPTIMIZERS), *(("nesterov", name) for name in SCHEDULES)],
)
def test_each_is_the_plain_loop_and_goes_on_from_a_checkpoint(
    optimizer: str, schedule: str | None, exact: Any, tmp_path: Path
) -> None:
    """Bit for bit over 8 steps, through a checkpoint after the third."""
    make, follow = OPTIMIZERS[optimizer], SCHEDULES[schedule] if schedule else None
    losses, model = plain(make, follow, 8)
    recipe = Recipe(classify, make, follow, LossScaling("none"))
    original = exact.captured.model

    def race() -> Race:
        return Race(original, exact, recipe, POINTS, 0, PAIR, 8)

    with training(original, exact):
        first, second = race(), race()
        for _ in range(3):
            first.step()
        checkpoint.save(tmp_path, first.state(), fingerprint={})
        loaded = checkpoint.load(tmp_path, {})
        assert loaded is not None
        second.load(loaded)
        while second.step():
            pass
    state = model.state_dict()
    for arm in (spec.name for spec in PAIR):
        found = second.arms[arm]
        assert found.losses == losses, arm
        assert_same_bits({name: state[name] for name in found.tensors}, found.tensors)
    assert losses[-1] != losses[0]


@pytest.mark.slow
def test_an_optimizer_that_evaluates_the_loss_again(exact: Any) -> None:
    recipe = Recipe(classify, lambda p: optim.LBFGS(p), path="net.py")
    with training(exact.captured.model, exact):
        race = Race(exact.captured.model, exact, recipe, POINTS, 0, PAIR, 1)
        with pytest.raises(ModelError, match=r"the optimizer's step raised TypeError: .*closure"):
            race.step()


@pytest.mark.slow
def test_a_skipped_step_leaves_weights_and_schedule(exact: Any) -> None:
    mixed = convert_net(torch.float16)
    recipe = Recipe(
        classify, OPTIMIZERS["nesterov"], SCHEDULES["step"], LossScaling("static", 2.0**60)
    )
    with training(mixed.captured.model, mixed):
        race = Race(mixed.captured.model, mixed, recipe, POINTS, 0, PAIR, 3)
        while race.step():
            pass
    arm = race.arms["mixed"]
    assert arm.skipped == [1, 2, 3]
    assert arm.scales == [2.0**60] * 3
    assert arm.scheduler.last_epoch == 0
    for name in race.weights.parameters:
        assert torch.equal(arm.tensors[name], race.initial[name]), name
