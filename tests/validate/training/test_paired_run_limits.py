"""What an arm cannot have of its own, and interruptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training.arm_specs import ARMS, PAIR
from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training
from tests.bits import assert_same_bits
from tests.training import POINTS, Net, classify, convert_net, points
from tests.validate.training.raced_arms import adamw, convert, raced

NONE = LossScaling("none")


# --- what an arm cannot have of its own ---


def test_what_an_optimizer_may_not_have() -> None:
    scale = nn.Parameter(torch.ones(2, 2))

    def foreign(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([*parameters, scale], 0.1)

    converted = convert_net(torch.float16)
    with pytest.raises(ModelError) as refused:
        raced(converted, Recipe(classify, foreign, path="net.py"))
    assert str(refused.value) == (
        "optimizer() also updates a tensor of shape (2, 2) that is no parameter of the model "
        "(at net.py). Make it a parameter of the model: each arm has to have its own."
    )


def test_parameters_on_the_same_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with (
        pytest.raises(ModelError, match=r"parameters 0\.weight and 1\.weight share their memory"),
        training(model, None),
    ):
        pass


@pytest.mark.slow
def test_complex_parameters_and_a_loss_scale() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.fft.rfft(x) @ self.weight).abs() + self.bias

    torch.manual_seed(0)
    converted = convert(Spectral(), torch.randn(4, 8), preset="default")
    data = dataclasses.replace(POINTS, initial_model=None)
    with pytest.raises(ModelError, match=r"weight is complex64, which torch\.amp\.GradScaler"):
        raced(converted, Recipe(classify, adamw), data)
    race = raced(converted, Recipe(classify, adamw, scaling=NONE), data, 3)
    fp32 = race.arms["fp32"].tensors
    moved = sum(float((fp32[n] - race.initial[n]).abs().square().sum()) for n in fp32) ** 0.5
    drift = sum(float((race.arms["mixed"].tensors[n] - fp32[n]).abs().square().sum()) for n in fp32)
    assert race.outcome.arm("mixed").drift == pytest.approx(drift**0.5 / moved, rel=1e-4)


@pytest.mark.slow
def test_sparse_gradients_are_trained_and_measured() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)
            self.out = nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids).mean(1))

    def ids(seed: int) -> Iterator[Batch]:
        source = torch.Generator().manual_seed(seed)
        while True:
            found = torch.randint(50, (16, 5), generator=source)
            yield (found,), {}, found[:, 0] % 3

    torch.manual_seed(0)
    converted = convert(Bag(), torch.randint(50, (4, 5)), preset="default")
    recipe = Recipe(classify, lambda p: torch.optim.SGD(p, 0.5))
    race = raced(converted, recipe, Data(ids), 4, ARMS)
    assert [arm.note for arm in race.arms.values()] == [""] * 4
    assert all(arm.peak_bytes for arm in race.arms.values())


def test_the_model_is_left_as_it_was_whatever_the_code_does() -> None:
    """An initial_model that draws anew into the very model, and an optimizer that freezes."""
    converted = convert_net(torch.float16)
    model = converted.captured.model

    def in_place(seed: int) -> nn.Module:
        torch.manual_seed(seed + 7)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model

    def freezes(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        first.requires_grad_(False)
        return torch.optim.SGD(rest, 0.1)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    raced(converted, Recipe(classify, freezes), dataclasses.replace(POINTS, initial_model=in_place))
    assert_same_bits(before, dict(model.state_dict()))
    assert pointers == [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- autocast, seeds, interruptions and checkpoints ---


@pytest.mark.slow
def test_an_original_that_autocast_breaks_in_eval_only() -> None:
    class Banned(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if self.training:
                return y
            return y.index_add(0, torch.zeros(1, dtype=torch.long), torch.ones(1, 3))

    torch.manual_seed(0)
    converted = convert(Banned(), torch.randn(4, 8), preset="default")
    data = dataclasses.replace(POINTS, initial_model=None)
    race = raced(converted, Recipe(classify, adamw), data, 2, ARMS)
    native = race.outcome.arm("autocast")
    assert native.note.startswith("the original fails under torch.autocast: ")
    assert (len(native.losses), native.metrics) == (2, {})
    assert race.outcome.arm("mixed").metrics


@pytest.mark.slow
def test_seeds_that_repeat_each_other_are_no_evidence() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    converted = convert(Plain(), torch.randn(4, 8), preset="default")
    data = Data(lambda seed: points(0), lambda: points(9, 1))
    options = Options(steps=3, seeds=5, margin=Margin(0.1))
    with pytest.raises(ModelError) as refused:
        compare_training(converted, Recipe(classify, adamw, path="net.py"), data, options)
    assert str(refused.value) == (
        "FP32 training with seed 1 ends in the very weights of seed 0 (at net.py). "
        "Let train_batches(seed) depend on its seed, or define initial_model(seed)."
    )


def test_a_ctrl_c_that_kills_the_users_workers_too() -> None:
    """The draw or the evaluation that fails then is the end, and no error."""
    asked: list[bool] = []

    def broken(seed: int) -> Iterator[Batch]:
        for index, batch in enumerate(points(seed)):
            if index == 3:
                asked.append(True)
                raise ModelError("a worker exited unexpectedly")
            yield batch

    def dead() -> Iterator[Batch]:
        if asked:
            raise ModelError("a worker exited unexpectedly")
        return points(9, 1)

    data = dataclasses.replace(POINTS, train_batches=broken, eval_batches=dead)
    found = compare_training(
        convert_net(torch.float16),
        Recipe(classify, adamw),
        data,
        Options(steps=9),
        should_stop=lambda: bool(asked),
    )
    assert (found.interrupted, found.ended) == (True, "interrupted after 3 of 9 steps")
    assert [len(arm.losses) for arm in found.run.arms] == [3] * 4
    assert [arm.metrics for arm in found.run.arms] == [{}] * 4


@pytest.mark.slow
def test_the_interval_of_checkpoints_is_counted_over_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: saved.append(1))
    options = Options(steps=4, seeds=5, margin=Margin(0.9), checkpoint=tmp_path, checkpoint_every=5)
    compare_training(convert_net(torch.float16), Recipe(classify, adamw), POINTS, options)
    assert len(saved) == 3  # of 20 steps; never right at the end of a seed


@pytest.mark.slow
def test_a_scheduler_that_does_not_tell_its_state(tmp_path: Any) -> None:
    class Homemade:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.param_groups[0]["lr"] *= 0.9

    said: list[str] = []
    recipe = Recipe(classify, adamw, Homemade)
    options = Options(steps=3, checkpoint=tmp_path, checkpoint_every=2)
    found = compare_training(convert_net(torch.float16), recipe, POINTS, options, say=said.append)
    assert found.run.steps == 3
    assert said == [
        "scheduler() gives a Homemade without state_dict(). A checkpoint needs it; else leave "
        "--checkpoint out."
    ]


def test_an_optimizers_state_keeps_its_dtype(tmp_path: Any) -> None:
    """`load_state_dict` would make FP32 of the FP64 sum."""

    class Summing(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("sum", torch.zeros_like(parameter, dtype=torch.float64))
                    state["sum"] += parameter.grad.double() / 3
                    parameter -= (0.1 * state["sum"]).to(parameter.dtype)

    converted, recipe = convert_net(torch.float16), Recipe(classify, Summing, scaling=NONE)
    model = converted.captured.model
    with training(model, converted):
        whole, first, second = (
            Race(model, converted, recipe, POINTS, 0, PAIR, 6) for _ in range(3)
        )
        while whole.step():
            pass
        for _ in range(3):
            first.step()
        checkpoint.save(tmp_path, first.state(), fingerprint={})
        second.load(checkpoint.load(tmp_path, {}) or {})
        while second.step():
            pass
    for name in (spec.name for spec in PAIR):
        assert second.arms[name].sha256() == whole.arms[name].sha256()


def test_a_state_that_safetensors_has_no_name_for(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"state\.x is a torch\.strided tensor of torch\.complex1"):
        checkpoint.save(tmp_path, {"x": torch.zeros(2, dtype=torch.complex128)}, fingerprint={})
