"""Models of other sources: graph networks, sentence-transformers, Keras, PyTorch's own layers."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.benchmarks.architectures_models.architecture import (
    VOCABULARY,
    Architecture,
    Inputs,
    ids,
    text,
)
from tests.benchmarks.architectures_models.texts import TEXT


class Gcn(nn.Module):
    """A graph convolution (Kipf and Welling): sums over edges, scaled by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    @staticmethod
    def spread(x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.ones(len(x)).index_add(0, target, torch.ones(len(target)))
        scale = (degree[source] * degree[target]).rsqrt().unsqueeze(1)
        return torch.zeros_like(x).index_add(0, target, x[source] * scale)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.spread(self.first(x), edges).relu()
        return self.spread(self.second(hidden), edges)


def graph(batch: int, size: int) -> Inputs:
    nodes = 4 * batch
    return torch.randn(nodes, 8), torch.randint(nodes, (2, 3 * size))


class Sentences(nn.Module):
    """A BERT with the pooling and the norm of sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        from sentence_transformers.models import Normalize, Pooling

        self.bert = hf.BertModel(hf.BertConfig(**TEXT))
        self.pooling, self.norm = Pooling(TEXT["hidden_size"]), Normalize()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids, attention_mask).last_hidden_state
        features = {"token_embeddings": tokens, "attention_mask": attention_mask}
        found: dict[str, Any] = self.norm(self.pooling(features))
        return found["sentence_embedding"]


def keras_sequential() -> nn.Module:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    dense = keras.layers.Dense
    layers = [keras.Input((16,)), dense(32, "relu"), keras.layers.LayerNormalization(), dense(4)]
    built: nn.Module = keras.Sequential(layers)
    return built


def keras_functional() -> nn.Module:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    given = keras.Input((None, 16))
    attended = keras.layers.MultiHeadAttention(2, 8)(given, given)
    joined = keras.layers.Add()([given, attended])
    pooled = keras.layers.GlobalAveragePooling1D()(joined)
    built: nn.Module = keras.Model(given, keras.layers.Dense(4)(pooled))
    return built


class PackedTagger(nn.Module):
    """An LSTM tagger with packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 5)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(words), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=words.shape[1]
        )
        return self.head(hidden)


def lengths(batch: int, length: int) -> Inputs:
    return ids(batch, length), torch.linspace(length, length // 2, batch).long()


class Ctc(nn.Module):
    """Convolutions, a GRU and log-probabilities of letters, as CTC wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(20, 32, 3, stride=2, padding=1)
        self.gru = nn.GRU(32, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 12)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv(features.transpose(1, 2)).relu().transpose(1, 2)
        return self.head(self.gru(hidden)[0]).log_softmax(-1).transpose(0, 1)


def _numbers(batch: int, size: int) -> Inputs:
    return torch.randn(batch, size, 16)


def _row(batch: int, size: int) -> Inputs:
    return torch.randn(batch, 16)


def _features(batch: int, size: int) -> Inputs:
    return torch.randn(batch, 2 * size, 20)


def transformer_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


_SENTENCES = "sentence-transformers"
ARCHITECTURES = (
    Architecture("GCN", "own code", Gcn, graph),
    Architecture("encoder", _SENTENCES, Sentences, text, package="sentence_transformers"),
    Architecture("Sequential", "Keras", keras_sequential, _row, package="keras"),
    Architecture("functional", "Keras", keras_functional, _numbers, package="keras"),
    Architecture("LSTM tagger, packed", "PyTorch", PackedTagger, lengths),
    Architecture("CTC", "PyTorch", Ctc, _features),
    Architecture("TransformerEncoder", "PyTorch", transformer_encoder, _numbers),
)
