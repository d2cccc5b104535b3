"""The examples are model files as the README describes them, and do what their docstrings say."""

from __future__ import annotations

import inspect
import math
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.examples.example_files import load

SIGNATURES = {
    "build_model": [],
    "example_inputs": [],
    "eval_batches": [],
    "metrics": ["outputs", "target"],
    "train_batches": ["seed"],
    "loss": ["outputs", "target"],
    "optimizer": ["parameters"],
}


FORWARD_ONLY = ("build_model", "example_inputs", "eval_batches", "metrics")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load("digits_cnn")


@pytest.fixture(scope="module")
def digits_model(digits: ModuleType) -> nn.Module:
    model: nn.Module = digits.build_model()
    return model


def first_pass(digits: ModuleType, seed: int) -> tuple[Tensor, Tensor]:
    """The images and digits of the first pass over the training set."""
    total = len(digits.split_digits()[0])
    images, labels = (torch.cat(parts) for parts in zip(*digits.train_batches(seed), strict=True))
    assert len(images) == digits.EPOCHS * total
    return images[:total], labels[:total]


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    ("example", "names"),
    [
        ("char_gpt", tuple(SIGNATURES)),
        ("digits_cnn", tuple(SIGNATURES)),
        ("minilm", FORWARD_ONLY),
    ],
)
def test_functions_have_the_names_and_parameters_of_the_contract(
    example: str, names: tuple[str, ...]
) -> None:
    module = load(example)
    found = {name: list(inspect.signature(getattr(module, name)).parameters) for name in names}
    assert found == {name: SIGNATURES[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("example", ["char_gpt", "digits_cnn", "minilm"])
def test_building_twice_gives_the_same_model_and_leaves_the_random_state(example: str) -> None:
    module = load(example)
    if example == "char_gpt":
        module.BUILD_STEPS = 2  # its hundred take half a minute on one core
    before = torch.get_rng_state()
    first = module.build_model()
    torch.manual_seed(int(torch.randint(2**31, ()).item()))
    between = torch.get_rng_state()
    second = module.build_model()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert_same_state(first, second)
    assert torch.equal(between, after)
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}


@pytest.mark.slow
def test_digits_cnn_has_batch_norm_and_in_place_relu(digits_model: nn.Module) -> None:
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in digits_model.modules())
    relus = [layer for layer in digits_model.modules() if isinstance(layer, nn.ReLU)]
    assert relus
    assert all(layer.inplace for layer in relus)


@pytest.mark.slow
def test_digits_cnn_recognises_the_test_digits(digits: ModuleType, digits_model: nn.Module) -> None:
    right = count = 0
    for images, labels in digits.eval_batches():
        assert images.shape == (60, 1, 8, 8)
        assert images.dtype == torch.float32
        with torch.no_grad():
            logits = digits_model(images)
        assert logits.shape == (60, 10)
        scores = digits.metrics(logits, labels)
        assert scores.keys() == {"accuracy", "nll"}
        right += round(scores["accuracy"] * len(labels))
        count += len(labels)
    assert count == 360
    assert right / count >= 0.97


def test_digits_metrics_of_known_logits(digits: ModuleType) -> None:
    # Both rows give digit 0 the probability 3/4 and each of the others 1/36.
    logits = torch.full((2, 10), 1 / 36).log()
    logits[:, 0] = torch.tensor(3 / 4).log()
    labels = torch.tensor([0, 1])
    expected = -(math.log(3 / 4) + math.log(1 / 36)) / 2
    scores = digits.metrics(logits, labels)
    assert scores == {"accuracy": 0.5, "nll": pytest.approx(expected, rel=1e-6)}
    assert digits.loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert set(digits.lower_is_better) == {"nll"}


def test_digits_train_and_test_images_are_the_whole_data_set(digits: ModuleType) -> None:
    train_images, train_digits, test_images, test_digits = digits.split_digits()
    rows = torch.cat(
        [
            torch.cat([train_images, test_images]).flatten(1) * 16,
            torch.cat([train_digits, test_digits]).unsqueeze(1),
        ],
        dim=1,
    )
    images, labels = load_digits(return_X_y=True)
    expected = sorted((*image, label) for image, label in zip(images, labels, strict=True))
    assert sorted(map(tuple, rows.tolist())) == expected
    assert len(test_images) == 360


def test_digits_train_batches_differ_by_seed_in_order_only(digits: ModuleType) -> None:
    images, labels = first_pass(digits, seed=3)
    again, _ = first_pass(digits, seed=3)
    other, _ = first_pass(digits, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert sorted(images.flatten(1).tolist()) == sorted(other.flatten(1).tolist())
    assert sorted(labels.tolist()) == sorted(digits.split_digits()[1].tolist())


def test_digits_loss_and_optimizer_train_a_fresh_network(digits: ModuleType) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = digits.DigitsCNN()
    optimizer = digits.optimizer(model.parameters())
    images, labels = next(iter(digits.train_batches(0)))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = digits.loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
