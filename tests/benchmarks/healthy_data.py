"""Real data that installed packages carry, and the losses and metrics of each task."""

from __future__ import annotations

import math
import sysconfig
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Any, Any]


Loss = Callable[[Any, Any], Tensor]


Metrics = Callable[[Any, Any], dict[str, float]]


def classify(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), target.flatten())


def accuracy(outputs: Tensor, target: Tensor) -> dict[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == target).float().mean())}


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


def error(outputs: Tensor, target: Tensor) -> dict[str, float]:
    return {"mse": float(F.mse_loss(outputs, target))}


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(found.target)


def _rows(count: int, train: bool, held_out: int, g: torch.Generator, size: int) -> Tensor:
    """Indices of samples, of the last `held_out` for evaluation and of the rest for training."""
    low, high = (0, count - held_out) if train else (count - held_out, count)
    return torch.randint(low, high, (size,), generator=g)


def evals(make: Callable[[torch.Generator, bool], Batch], count: int = 8) -> list[Batch]:
    g = torch.Generator().manual_seed(99)
    return [make(g, False) for _ in range(count)]


def digit_batch(g: torch.Generator, train: bool = True) -> Batch:
    images, labels = digits()
    rows = _rows(len(images), train, 400, g, 64 if train else 128)
    return images[rows], labels[rows]


def clean_digits(g: torch.Generator, train: bool = True) -> Batch:
    images, _ = digit_batch(g, train)
    return images, images


def noisy_digits(g: torch.Generator, train: bool = True) -> Batch:
    images, _ = digit_batch(g, train)
    return images + 0.3 * torch.randn(images.shape, generator=g), images


def diffused_digits(g: torch.Generator, train: bool = True) -> Batch:
    """Noisy images with their time, and the noise to be predicted."""
    images, _ = digit_batch(g, train)
    t = torch.rand(len(images), generator=g)
    noise = torch.randn(images.shape, generator=g)
    keep = torch.cos(t * math.pi / 2)[:, None, None, None]
    return {"x": keep * images + (1 - keep**2).sqrt() * noise, "t": t}, noise


def inked(g: torch.Generator, train: bool = True) -> Batch:
    """Images, and which of their pixels are ink: a segmentation."""
    images, _ = noisy_digits(g, train)
    return images, (digit_batch(g, train)[0] * 0 + (images > 0.5)).long()[:, 0]


@cache
def text() -> Tensor:
    """Python's own source, as bytes below 128."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "csv", "datetime", "difflib", "inspect", "os", "pickle", "random")
    raw = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    return torch.tensor([c for c in raw if c < 128], dtype=torch.long)


def next_characters(g: torch.Generator, train: bool = True) -> Batch:
    source = text()
    starts = _rows(len(source) - 33, train, 20_000, g, 32)
    rows = source[starts[:, None] + torch.arange(33)]
    return rows[:, :-1], rows[:, 1:]


def kind_of_line(g: torch.Generator, train: bool = True) -> Batch:
    """Characters of a stretch of source, and whether it defines something."""
    source = text()
    starts = _rows(len(source) - 64, train, 20_000, g, 64)
    rows = source[starts[:, None] + torch.arange(64)]
    has_def = ((rows[:, :-2] == 100) & (rows[:, 1:-1] == 101) & (rows[:, 2:] == 102)).any(1)
    return rows, has_def.long()


def reversed_words(g: torch.Generator, train: bool = True) -> Batch:
    """Eight characters, and the same backwards, for an encoder and a decoder."""
    source = text()
    starts = _rows(len(source) - 9, train, 20_000, g, 64)
    word = source[starts[:, None] + torch.arange(8)]
    back = word.flip(1)
    begun = torch.cat([torch.zeros(len(word), 1, dtype=torch.long), back[:, :-1]], 1)
    return (word, begun), back


RECORDING = Path(sysconfig.get_path("stdlib")) / "test" / "audiodata" / "pluck-pcm16.wav"


@cache
def audio() -> Tensor:
    with wave.open(str(RECORDING)) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        mono = raw.reshape(-1, file.getnchannels()).mean(1)
    return torch.tensor(mono / 32768, dtype=torch.float32)


def noisy_sound(g: torch.Generator, train: bool = True) -> Batch:
    sound = audio()
    starts = _rows(len(sound) - 256, train, len(sound) // 5, g, 32)
    clean = sound[starts[:, None] + torch.arange(256)][:, None] * 4
    return clean + 0.1 * torch.randn(clean.shape, generator=g), clean


def loudness(g: torch.Generator, train: bool = True) -> Batch:
    """Sound, and in which of four classes its loudness is."""
    sound = audio()
    starts = _rows(len(sound) - 256, train, len(sound) // 5, g, 64)
    rows = sound[starts[:, None] + torch.arange(256)]
    return rows[:, None] * 4, torch.bucketize(rows.std(1), torch.tensor([0.02, 0.05, 0.12]))


@cache
def karate() -> tuple[Tensor, Tensor]:
    graph = nx.karate_club_graph()
    adjacency = torch.tensor(nx.to_numpy_array(graph), dtype=torch.float32).clamp(max=1)
    clubs = [graph.nodes[n]["club"] == "Officer" for n in graph]
    return adjacency + torch.eye(len(adjacency)), torch.tensor(clubs).long()


def karate_nodes(g: torch.Generator, train: bool = True) -> Batch:
    """The graph with noise in the features, and the club of each member."""
    adjacency, clubs = karate()
    count = len(clubs)
    features = torch.eye(count)[None] + 0.1 * torch.randn(8, count, count, generator=g)
    return (features, adjacency.expand(8, -1, -1)), clubs.expand(8, -1)


@cache
def table(name: str) -> tuple[Tensor, Tensor]:
    found = getattr(datasets, f"load_{name}")()
    x = torch.tensor(found.data, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = ((x - x.mean(0)) / x.std(0))[order]
    return x, torch.tensor(found.target)[order]


def table_batch(name: str, g: torch.Generator, train: bool = True) -> Batch:
    x, y = table(name)
    rows = _rows(len(x), train, len(x) // 4, g, 48)
    if y.is_floating_point():
        return x[rows], (y[rows].float()[:, None] - 150) / 77
    return x[rows], y[rows]


@cache
def characters() -> Tensor:
    """How often each pair of Les Misérables appears together."""
    matrix = nx.to_numpy_array(nx.les_miserables_graph())
    return torch.tensor(np.log1p(matrix), dtype=torch.float32)


def meetings(g: torch.Generator, train: bool = True) -> Batch:
    together = characters()
    pairs = torch.randint(len(together), (128, 2), generator=g)
    return (pairs[:, 0], pairs[:, 1]), together[pairs[:, 0], pairs[:, 1]]
