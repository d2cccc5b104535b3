"""Small models that are trained on real data: `HEALTHY` has one entry a model.

All data comes with installed packages: scikit-learn's digits, photographs and tables, the karate
club and Les Misérables of networkx, Python's own source for text, and the recording of a plucked
string that Python's tests carry. Each model is built anew for a seed, trained by `trained`, and has
eval batches that it was not trained on.
"""

from __future__ import annotations

import math
import sysconfig
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]
Metrics = Callable[[Any, Any], dict[str, float]]


@dataclass(frozen=True)
class Healthy:
    """A model and its data: `batch` draws a training batch, `evals` are held out."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    evals: Callable[[], list[Batch]]
    loss: Loss
    metrics: Metrics
    lower_is_better: tuple[str, ...] = ()
    steps: int = 150
    rate: float = 3e-3

    def initial(self, seed: int) -> nn.Module:
        """The model before any training."""
        torch.manual_seed(seed)
        return self.build()

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        g = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(g)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.rate)

    def trained(self) -> nn.Module:
        """The model after `steps` of training, in eval mode."""
        model = self.initial(0).train()
        optimizer, batches = self.optimizer(model.parameters()), self.train_batches(1)
        for _ in range(self.steps):
            inputs, target = next(batches)
            optimizer.zero_grad()
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
            args = args if isinstance(args, tuple) else (args,)
            self.loss(model(*args, **kwargs), target).backward()
            optimizer.step()
        return model.eval()


# --- losses and metrics --------------------------------------------------------------------------


def classify(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), target.flatten())


def accuracy(outputs: Tensor, target: Tensor) -> dict[str, float]:
    return {"accuracy": float((outputs.argmax(-1) == target).float().mean())}


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


def error(outputs: Tensor, target: Tensor) -> dict[str, float]:
    return {"mse": float(F.mse_loss(outputs, target))}


# --- data ----------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(found.target)


def _rows(count: int, train: bool, held_out: int, g: torch.Generator, size: int) -> Tensor:
    """Indices of samples, of the last `held_out` for evaluation and of the rest for training."""
    low, high = (0, count - held_out) if train else (count - held_out, count)
    return torch.randint(low, high, (size,), generator=g)


def _evals(make: Callable[[torch.Generator, bool], Batch], count: int = 8) -> list[Batch]:
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


# --- models --------------------------------------------------------------------------------------


def conv(i: int, o: int, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o, momentum=0.3), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two = conv(size, size), nn.Conv2d(size, size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


def pooled(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


class ConvNext(nn.Module):
    """A block with a depthwise convolution, LayerNorm and a small scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(size, size, 5, padding=2, groups=size)
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 4 * size)
        self.down, self.scale = nn.Linear(4 * size, size), nn.Parameter(torch.full((size,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depth(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.body(h).mean(1))


class UNet(nn.Module):
    def __init__(self, out: int = 1, timed: bool = False) -> None:
        super().__init__()
        self.down, self.mid = conv(1, 16), nn.Sequential(nn.MaxPool2d(2), conv(16, 32))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.out = nn.Sequential(conv(32, 16), nn.Conv2d(16, out, 1))
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32)) if timed else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        one = self.down(x)
        two = self.mid(one)
        if self.time is not None and t is not None:
            angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
            two = two + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        return self.out(torch.cat([one, self.up(two)], 1))


class Segmenter(UNet):
    """Classes last, as the losses here take them."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decode(z).view_as(x), mean, log_var


def elbo(outputs: Any, target: Tensor) -> Tensor:
    image, mean, log_var = outputs
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
    return F.binary_cross_entropy(image, target.clamp(0, 1)) * 64 + kl


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


class CharModel(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 48), nn.Linear(48, 128)
        self.rnn: nn.Module | None = None
        if kind == "lstm":
            self.rnn = nn.LSTM(48, 48, batch_first=True)
        else:
            self.places = nn.Parameter(0.02 * torch.randn(1, 32, 48))
            layer = nn.TransformerEncoderLayer(48, 4, 96, 0.1, "gelu", batch_first=True,
                                               norm_first=True)  # fmt: skip
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        if self.rnn is not None:
            return self.head(self.rnn(h)[0])
        size = ids.shape[1]
        mask = torch.full((size, size), -torch.inf).triu(1)
        return self.head(self.body(h + self.places, mask=mask))


class TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 24), nn.Linear(48, 2)
        self.convs = nn.ModuleList(nn.Conv1d(24, 24, k) for k in (3, 5))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(c(h)).amax(2) for c in self.convs], 1))


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(128, 32), nn.LayerNorm(32)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, 32))
        self.body = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body(self.norm(self.embed(ids) + self.places))
        return self.head(h.amax(1))


class Seq2seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(128, 32), nn.Parameter(0.1 * torch.randn(1, 8, 32))
        self.body = nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 128)

    def forward(self, word: Tensor, begun: Tensor) -> Tensor:
        mask = torch.full((8, 8), -torch.inf).triu(1)
        source, target = (self.embed(ids) + self.places for ids in (word, begun))
        return self.head(self.body(source, target, tgt_mask=mask))


class Wave(nn.Module):
    """Dilated convolutions with gates and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 1, 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(16, 32, 3, padding=d, dilation=d) for d in (1, 2, 4, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for layer in self.layers:
            a, b = layer(h).chunk(2, 1)
            h = h + a.tanh() * b.sigmoid()
        return self.end(h)


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 16, 9, 4),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Conv1d(16, 32, 9, 4),
            nn.GELU(),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).abs().mean(2))


class Gcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(34, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True)
        norm = adjacency / degree.sqrt() / degree.sqrt().transpose(1, 2)
        return self.two(norm @ F.relu(self.one(norm @ x)))


class Gat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(34, 16), nn.Linear(16, 2)
        self.left, self.right = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.body(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(adjacency == 0, -1e9).softmax(-1)
        return self.head(F.elu(weights @ h))


class TabTransformer(nn.Module):
    """A token a column."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.3 * torch.randn(columns, 16))
        self.shift = nn.Parameter(0.3 * torch.randn(columns, 16))
        self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[..., None] * self.scale + self.shift).mean(1))


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(77, 16), nn.Embedding(77, 16)
        self.bias = nn.Embedding(77, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = (self.one(a) * self.other(b)).sum(1)
        return product + self.bias(a)[:, 0] + self.bias(b)[:, 0]


class Deep(nn.Module):
    """Factors that go through layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(77, 16), nn.Embedding(77, 16)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat([self.one(a), self.other(b)], 1))[:, 0]


def mlp(i: int, o: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, o)
    )


# --- the list ------------------------------------------------------------------------------------

Make = Callable[..., Batch]


def _classifier(name: str, build: Callable[[], nn.Module], make: Make, **more: Any) -> Healthy:
    return Healthy(name, build, make, lambda: _evals(make), classify, accuracy, **more)


def _regressor(name: str, build: Callable[[], nn.Module], make: Make, **more: Any) -> Healthy:
    return Healthy(name, build, make, lambda: _evals(make), mse, error, ("mse",), **more)


def _table(name: str) -> Make:
    return lambda g, train=True: table_batch(name, g, train)


def _vae_error(outputs: Any, target: Tensor) -> dict[str, float]:
    return error(outputs[0], target)


HEALTHY = (
    _classifier("digits-mlp", lambda: nn.Sequential(nn.Flatten(), mlp(64, 10)), digit_batch),
    _classifier(
        "digits-cnn", lambda: pooled(conv(1, 16), conv(16, 32), width=32), digit_batch, rate=1e-2
    ),
    _classifier(
        "digits-resnet",
        lambda: pooled(conv(1, 16), Residual(16), Residual(16), width=16),
        digit_batch,
    ),
    _classifier(
        "digits-mobile",
        lambda: pooled(
            conv(1, 16), conv(16, 16, 16), nn.Conv2d(16, 32, 1), nn.Hardswish(), width=32
        ),
        digit_batch,
    ),
    _classifier(
        "digits-convnext",
        lambda: pooled(nn.Conv2d(1, 16, 3, padding=1), ConvNext(16), ConvNext(16), width=16),
        digit_batch,
    ),
    _classifier("digits-vit", Vit, digit_batch),
    _classifier("digits-lstm", lambda: Recurrent("LSTM"), digit_batch),
    _classifier("digits-gru", lambda: Recurrent("GRU"), digit_batch),
    _regressor("digits-denoise-unet", UNet, noisy_digits),
    _classifier("digits-segment-unet", Segmenter, inked),
    _regressor("digits-diffusion", lambda: UNet(timed=True), diffused_digits),
    Healthy(
        "digits-vae", Vae, clean_digits, lambda: _evals(clean_digits), elbo, _vae_error, ("mse",)
    ),
    _regressor(
        "digits-autoencoder",
        lambda: nn.Sequential(nn.Flatten(), mlp(64, 8), mlp(8, 64), nn.Unflatten(1, (1, 8, 8))),
        clean_digits,
    ),
    _classifier("text-gpt", lambda: CharModel("gpt"), next_characters),
    _classifier("text-lstm", lambda: CharModel("lstm"), next_characters),
    _classifier("text-cnn", TextCnn, kind_of_line),
    _classifier("text-encoder", TextEncoder, kind_of_line),
    _classifier("text-seq2seq", Seq2seq, reversed_words),
    _regressor("audio-wave", Wave, noisy_sound),
    _classifier("audio-classes", Sound, loudness),
    _classifier("graph-gcn", Gcn, karate_nodes, rate=1e-2),
    _classifier("graph-gat", Gat, karate_nodes, rate=1e-2),
    _classifier("table-cancer", lambda: mlp(30, 2), _table("breast_cancer")),
    _classifier("table-wine-transformer", lambda: TabTransformer(13, 3), _table("wine")),
    _regressor("table-diabetes", lambda: mlp(10, 1), _table("diabetes")),
    _regressor("recommender-factors", Factors, meetings, rate=1e-2),
    _regressor("recommender-deep", Deep, meetings),
)
