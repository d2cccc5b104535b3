"""Batches, first weights and random numbers of a training run, each from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError
from amp_convert.core.files.digests import of_tensors
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.validate.training.data import Data, Stream, initial_weights, seeded_rng
from amp_convert.validate.training.weights import Weights
from tests.bits import assert_same_bits

CPU = torch.device("cpu")


def number(step: int) -> Batch:
    return (torch.full((2,), float(step)),), {}, step


def numbered(count: int) -> Data:
    return Data(lambda seed: (number(100 * seed + step) for step in range(count)))


def stream(data: Data, accumulate: int = 1, seed: int = 0) -> Stream:
    return Stream(data, seed, seeded_rng(CPU, seed), CPU, accumulate)


def targets(batches: list[Batch] | None) -> list[Any] | None:
    return None if batches is None else [target for _, _, target in batches]


# Stream


def test_batches_come_in_order_a_step_at_a_time() -> None:
    drawn = stream(numbered(7), accumulate=2, seed=3)
    steps = [targets(drawn.draw(9)) for _ in range(5)]
    # The seventh batch makes no whole step.
    assert steps == [[300, 301], [302, 303], [304, 305], None, None]


def test_no_more_steps_than_asked_for() -> None:
    drawn = stream(numbered(7))
    assert [targets(drawn.draw(2)) for _ in range(3)] == [[0], [1], None]


def test_no_batch_is_made_before_it_is_drawn() -> None:
    made = []

    def batches(seed: int) -> Iterator[Batch]:
        for step in range(9):
            made.append(step)
            yield number(step)

    drawn = stream(Data(batches), accumulate=2)
    assert made == []
    drawn.draw(1)
    drawn.draw(1)  # there is no second step
    assert made == [0, 1]


def test_random_batches_have_a_random_state_of_their_own() -> None:
    """They are those of a loop of their own, whatever the model draws between them, and the
    model's draws are not disturbed by them."""

    def batches(seed: int) -> Iterator[Batch]:
        while True:
            yield (torch.randn(3),), {}, None

    torch.manual_seed(5)
    alone = [torch.randn(3) for _ in range(4)]
    torch.manual_seed(11)
    undisturbed = [torch.rand(2) for _ in range(4)]

    torch.manual_seed(11)
    drawn, between = stream(Data(batches), seed=5), []
    found = []
    for _ in range(4):
        [((inputs,), _, _)] = drawn.draw(9) or []
        found.append(inputs)
        between.append(torch.rand(2))
    assert_same_bits(alone, found)
    assert_same_bits(undisturbed, between)


def test_an_error_in_a_batch_leaves_the_random_state() -> None:
    def batches(seed: int) -> Iterator[Batch]:
        torch.manual_seed(seed)
        raise KeyError(seed)
        yield

    torch.manual_seed(4)
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        stream(Data(batches)).draw(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_digest_is_that_of_the_last_steps_tensors() -> None:
    inputs = torch.tensor([[1.0, -2.0], [0.5, float("nan")]])
    mask, empty = torch.tensor([True, False]), torch.empty(0)
    batch = ((inputs.T, 3), {"mask": mask}, [empty, torch.tensor(7)])
    drawn = stream(Data(lambda seed: iter([number(1), batch])))
    drawn.draw(2)
    first = drawn.digest()
    drawn.draw(2)
    parts = (inputs.T, mask, empty, torch.tensor(7))
    assert drawn.digest() == of_tensors(("", part) for part in parts)
    assert drawn.digest() != first


# initial_weights


class Net(nn.Module):
    """Shared weights, a buffer that is kept and one that is not."""

    kept: torch.Tensor
    unkept: torch.Tensor

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.one = nn.Linear(width, width, bias=False)
        self.two = nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("unkept", torch.rand(2), persistent=False)


def first_weights(model: nn.Module, made: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    data = Data(lambda seed: iter(()), initial_model=made)
    return initial_weights(Weights(model), data, "net.py", CPU, seed)


def test_training_starts_from_copies_of_the_models_own_weights() -> None:
    model = Net()
    found = first_weights(model, None)
    assert list(found) == ["one.weight", "two.bias", "kept", "unkept"]
    assert_same_bits(
        {"w": model.one.weight.data, "b": model.two.bias.data, "k": model.kept, "u": model.unkept},
        dict(zip("wbku", found.values(), strict=True)),
    )
    found["one.weight"].zero_()
    assert model.one.weight.any()


def test_training_starts_from_the_initial_model_of_its_seed() -> None:
    """It is made with that seed's random state, and the caller's stays."""
    model = Net()
    before = torch.get_rng_state()
    found = first_weights(model, lambda seed: Net(seed - 4), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    expected = Weights(Net()).get()
    assert_same_bits(expected, found)
    assert not any(tensor.requires_grad for tensor in found.values())


def without_a_buffer(seed: int) -> nn.Module:
    model = Net()
    del model.kept
    return model


OTHER = "initial_model() gives another model than the one to convert: "


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda seed: None, "initial_model() gives None"),
        (lambda seed: {"a": seed}, "initial_model() gives a dict"),
        (
            lambda seed: Net(seed + 4),
            f"{OTHER}its one.weight is a float32 tensor of shape (4, 4), not a float32 tensor of "
            "shape (3, 3)",
        ),
        (
            lambda seed: Net().double(),
            f"{OTHER}its one.weight is a float64 tensor of shape (3, 3), not a float32 tensor of "
            "shape (3, 3)",
        ),
        (lambda seed: nn.Sequential(Net()), f"{OTHER}it has no one.weight"),
        (without_a_buffer, f"{OTHER}it has no kept"),
    ],
)
def test_another_initial_model_is_refused(made: Any, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        first_weights(Net(), made)
    assert (caught.value.what, caught.value.where) == (said, "net.py")


def test_a_larger_initial_model_is_refused() -> None:
    larger = Net()
    larger.three = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"it has three\.weight as well"):
        first_weights(Net(), lambda seed: larger)


# The rest


def test_seeded_rng_is_the_state_after_seeding_all_three() -> None:
    torch.manual_seed(1)
    before = rng_state(CPU)
    found = seeded_rng(CPU, 42)
    assert found.device is None
    assert rng_state(CPU).same(before)
    torch.manual_seed(42)
    random.seed(42)
    np.random.seed(42)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand()
    set_rng_state(CPU, found)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected
    assert not found.same(rng_state(CPU))
