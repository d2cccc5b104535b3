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

from amp_convert.capture.regions import capture
from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.converted_model import ConvertedModel, convert_captured
from amp_convert.rules.load import load_rules
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
from tests.training import OPTIMIZERS, POINTS, Net, classify, convert_net, initial_model, points
from tests.zoo import assert_same_bits

NONE = LossScaling("none")


def convert(model: nn.Module, *args: torch.Tensor, preset: str = "fp32") -> ConvertedModel:
    captured = capture(model.eval(), args, {})
    stats = profile(captured, [(args, {})], [torch.float16])
    return convert_captured(captured, load_rules([preset]), stats, torch.float16)


def raced(
    converted: ConvertedModel,
    recipe: Recipe,
    data: Data = POINTS,
    steps: int = 6,
    names: tuple[str, ...] = PAIR,
) -> Race:
    """The race after its steps; the model is as it was."""
    model = converted.captured.model
    with training(model, converted):
        race = Race(model, converted, recipe, data, 0, names, steps)
        while race.step():
            pass
        race.outcome = race.result()  # type: ignore[attr-defined]
    return race


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"](parameters)


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
