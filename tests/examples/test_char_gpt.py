"""examples/char_gpt.py."""

from __future__ import annotations

import copy
import inspect
import math
import random
import uuid
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def fresh_gpt(char_gpt: ModuleType) -> nn.Module:
    """The network before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = char_gpt.CharGPT()
    return model.eval()


def test_char_gpt_reads_the_source_of_python_s_modules(char_gpt: ModuleType) -> None:
    names = (*char_gpt.TRAIN_FILES, *char_gpt.TEST_FILES)
    assert list(names) == sorted(set(names))
    text = char_gpt.read_text(("random", "uuid"))
    source = "\n".join(inspect.getsource(module) for module in (random, uuid))
    assert "".join(char_gpt.ALPHABET[place] for place in text.tolist()) == source
    for files, least in ((char_gpt.TRAIN_FILES, 600_000), (char_gpt.TEST_FILES, 100_000)):
        characters = char_gpt.read_text(files)
        assert len(characters) > least
        assert characters.eq(len(char_gpt.ALPHABET) - 1).double().mean() < 1e-3


def test_char_gpt_ties_its_tables_and_sees_only_what_came_before(
    char_gpt: ModuleType, fresh_gpt: nn.Module
) -> None:
    assert fresh_gpt.get_parameter("head.weight") is fresh_gpt.get_parameter("characters.weight")
    assert 500_000 < sum(parameter.numel() for parameter in fresh_gpt.parameters()) < 1_000_000
    characters = char_gpt.example_inputs()[:2]
    changed = characters.clone()
    changed[:, 40] = (changed[:, 40] + 1) % len(char_gpt.ALPHABET)
    with torch.no_grad():
        before, after = fresh_gpt(characters), fresh_gpt(changed)
    assert before.shape == (2, 64, 97)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 40:], after[:, 40:], rtol=0, atol=1e-3)


def test_char_gpt_targets_are_the_characters_that_follow(char_gpt: ModuleType) -> None:
    evaluated = list(char_gpt.eval_batches())
    assert len(evaluated) == 8
    test_text = char_gpt.read_text(char_gpt.TEST_FILES)
    assert torch.equal(evaluated[0][0][0], test_text[:64])
    for characters, following in (*evaluated, next(iter(char_gpt.train_batches(0)))):
        assert characters.shape == following.shape == (64, 64)
        assert characters.dtype == following.dtype == torch.int64
        assert torch.equal(characters[:, 1:], following[:, :-1])
    assert torch.equal(char_gpt.example_inputs(), evaluated[0][0])


def test_char_gpt_train_batches_are_set_by_the_seed(char_gpt: ModuleType) -> None:
    one, again = (list(char_gpt.train_batches(3)) for _ in range(2))
    assert len(one) == 300
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, again, strict=True))
    other, _ = next(iter(char_gpt.train_batches(4)))
    assert not torch.equal(one[0][0], other)


def test_char_gpt_metric_of_known_logits(char_gpt: ModuleType) -> None:
    # Half of the probability is on the right character at two of four places; else all are even.
    target = torch.tensor([[5, 6], [7, 8]])
    logits = torch.zeros(2, 2, 97)
    logits[0, torch.arange(2), target[0]] = math.log(96)
    expected = (2 * 1 + 2 * math.log2(97)) / 4
    scores = char_gpt.metrics(logits, target)
    assert scores == {"bits_per_character": pytest.approx(expected, rel=1e-6)}
    nats = char_gpt.loss(logits, target).item()
    assert nats == pytest.approx(expected * math.log(2), rel=1e-6)
    assert set(char_gpt.lower_is_better) == {"bits_per_character"}


@pytest.mark.slow
def test_char_gpt_loss_and_optimizer_train_a_fresh_network(
    char_gpt: ModuleType, fresh_gpt: nn.Module
) -> None:
    model = copy.deepcopy(fresh_gpt).train()
    assert model.get_parameter("head.weight") is model.get_parameter("characters.weight")
    optimizer = char_gpt.optimizer(model.parameters())
    characters, following = (part[:4] for part in next(iter(char_gpt.train_batches(0))))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = char_gpt.loss(model(characters), following)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    counts = torch.bincount(following.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    # Below what the frequencies alone of these characters give: it has learnt their order.
    assert losses[-1] < -(shares * shares.log()).sum() / 2
