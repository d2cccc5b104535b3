"""The arms of a paired run, against the loops that PyTorch's users write, bit for bit."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from amp_convert.validate.training.arm_specs import ARMS, FP32, NOISE, PAIR
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.paired_run import Race
from amp_convert.validate.training.training_mode import training
from tests.bits import assert_same_bits
from tests.training import Trained, by_hand, recipe

NONE = LossScaling("none")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["cnn", "lstm", "gpt2"])
def test_fp32_throughout_is_plain_eager_training(name: str, optimizer: str) -> None:
    """Over 50 steps, dropout and running statistics included: both arms, bit for bit."""
    trained, plain = Trained(name), Trained(name)
    how = recipe(optimizer, scaling=NONE)
    losses = by_hand(trained, plain.model, how, 50)
    converted = trained.converted(preset="fp32")
    with training(trained.model, converted):
        race = Race(trained.model, converted, how, trained.data, 0, PAIR, 50)
        while race.step():
            pass
    assert race.steps == 50
    state = plain.model.state_dict()
    for arm in race.arms.values():
        assert arm.losses == losses
        assert_same_bits({n: state[n] for n in arm.tensors}, arm.tensors)
    assert race.random_parted is None
    assert losses[-1] != losses[0]


@functools.cache
def how(dtype: torch.dtype) -> object:
    """Everything at once: a dynamic scale that overflows at first, two batches a step, clipping
    and a schedule."""
    return recipe(
        scaling=LossScaling(initial=2.0**23) if dtype == torch.float16 else NONE,
        accumulate=2,
        clip_norm=0.5,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cnn", "gpt2"])
def test_each_arm_is_the_loop_of_pytorchs_guide(name: str, dtype: torch.dtype) -> None:
    trained, steps = Trained(name), 8
    converted = trained.converted(dtype)
    scaled = how(dtype)
    with training(trained.model, converted):
        race = Race(trained.model, converted, scaled, trained.data, 3, ARMS, steps)
        while race.step():
            pass
    plain = dataclasses.replace(scaled, scaling=NONE)
    others = {"fp32": Trained(name), "mixed": Trained(name), "autocast": Trained(name)}
    mixed = others["mixed"].converted(dtype)
    losses = {
        "fp32": by_hand(trained, others["fp32"].model, plain, steps, seed=3),
        "mixed": by_hand(trained, mixed, scaled, steps, seed=3),
        "autocast": by_hand(
            trained, others["autocast"].model, scaled, steps, seed=3, autocast=dtype
        ),
    }
    for arm, expected in losses.items():
        state = others[arm].model.state_dict()
        assert race.arms[arm].losses == expected, arm
        assert_same_bits({n: state[n] for n in race.arms[arm].tensors}, race.arms[arm].tensors)
    if dtype == torch.float16:
        skipped = race.arms["mixed"].skipped
        assert skipped == list(range(1, len(skipped) + 1))
        assert 0 < len(skipped) < steps
        assert race.arms["mixed"].scales[0] == 2.0**23
        assert race.arms["mixed"].scales[-1] == 2.0 ** (23 - len(skipped))


def test_noise_begins_one_ulp_away() -> None:
    trained = Trained("lstm")
    with training(trained.model, None):
        race = Race(trained.model, None, recipe(scaling=NONE), trained.data, 0, (FP32, NOISE), 1)
        base, noisy = race.arms["fp32"].tensors, race.arms["noise"].tensors
        for name in race.weights.parameters:
            one, other = base[name], noisy[name]
            up = torch.equal(torch.nextafter(one, other), other)
            assert up, name
            assert not (one == other).any(), name
        assert all((noisy[n] > base[n]).any() and (noisy[n] < base[n]).any() for n in base)
        race.step()
        run = race.result()
    assert 0 < run.arm("noise").drift < 1e-2
    assert run.arm("noise").gradient_norms != run.arm("fp32").gradient_norms


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    trained = Trained("cnn")
    model, converted = trained.model, trained.converted()
    converted.eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [p.data_ptr() for p in (*model.parameters(), *model.buffers())]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with training(model, converted):
        race = Race(model, converted, recipe(), trained.data, 0, ARMS, 2)
        while race.step():
            pass
        race.result()
    assert_same_bits(before, dict(model.state_dict()))
    assert pointers == [p.data_ptr() for p in (*model.parameters(), *model.buffers())]
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert not converted.training
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["conv1.weight"]
    assert torch.equal(grads["conv1.weight"], torch.ones_like(model.conv1.weight))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_race_goes_on_from_its_state_in_the_same_bits(dtype: torch.dtype) -> None:
    trained = Trained("cnn")
    converted, scaled = trained.converted(dtype), how(dtype)

    def race() -> Race:
        return Race(trained.model, converted, scaled, trained.data, 0, ARMS, 6)

    with training(trained.model, converted):
        whole, first, second = race(), race(), race()
        for _ in range(6):
            whole.step()
        for _ in range(3):
            first.step()
        second.load(first.state())
        while second.step():
            pass
        runs = [dataclasses.asdict(each.result()) for each in (whole, second)]
    for run in runs:
        for arm in run["arms"]:
            arm["milliseconds"] = None
    assert repr(runs[0]) == repr(runs[1])  # NaN, the norm of skipped gradients, is not itself


@pytest.mark.slow
def test_what_is_measured_after_the_steps() -> None:
    """Distances, against their definition in FP64; memory and time are there."""
    trained = Trained("cnn")
    converted = trained.converted()
    with training(trained.model, converted):
        race = Race(trained.model, converted, recipe(), trained.data, 0, PAIR, 4)
        while race.step():
            pass
        run = race.result()

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        names = [name for name, _ in trained.model.named_parameters()]
        squares = [(a[n].double() - b[n].double()).square().sum() for n in names]
        return float(torch.stack(squares).sum().sqrt())

    fp32, mixed = (race.arms[name].tensors for name in (spec.name for spec in PAIR))
    moved = distance(fp32, race.initial)
    found = run.arm("mixed")
    assert found.drift == pytest.approx(distance(mixed, fp32) / moved, rel=1e-12)
    assert found.moved == pytest.approx(distance(mixed, race.initial) / moved, rel=1e-12)
    assert run.arm("fp32").drift == 0
    assert run.arm("fp32").moved == 1
    assert len(found.gradient_norms) == len(found.losses) == len(found.scales) == 4
    assert all(arm.milliseconds > 0 for arm in run.arms)
    weights = sum(p.numel() for p in trained.model.parameters()) * 4
    assert all(arm.peak_bytes > 4 * weights for arm in run.arms)  # gradients, two moments
