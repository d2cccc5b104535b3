"""A character-level GPT on the Python standard library's own source, trained on the spot.

Python brings the text along, so nothing is downloaded. Attention, LayerNorm, GELU, tied embeddings
and AdamW, on data that is far from learnt, make it a realistic case for comparing FP32 with mixed
training: in 300 steps, a minute on one core and half of that on two, it goes from the 4.6 bits per
character that letter frequencies alone give to 2.8, on files that it was not trained on.

`build_model` trains for the first 100 of those steps, about twenty seconds on one core, so that
converting it judges weights that mean something. The files differ between Python versions, so
compare the metric only between runs of one Python.

Run it with `amp-convert examples/char_gpt.py`.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
# Characters that the network sees at once.
CONTEXT = 64
BATCH_SIZE = 64
WIDTH = 128
HEADS = 4
LAYERS = 3
TRAIN_STEPS = 300
# What `build_model` trains for.
BUILD_STEPS = 100
EVAL_BATCHES = 8
# Any character that is not among these is read as the last of them.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"
# Long, hand-written modules that Python 3.11 and later have, in alphabetical order.
TRAIN_FILES = (
    "argparse", "ast", "calendar", "codecs", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "difflib", "dis", "doctest", "enum", "fractions", "ftplib",
    "functools", "gettext", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "mimetypes", "optparse", "os", "pdb", "pickle", "platform", "plistlib",
)  # fmt: skip
TEST_FILES = ("random", "shutil", "socket", "statistics", "tarfile", "threading", "typing", "uuid")

# Of the metrics below, those of which less is better.
lower_is_better = {"bits_per_character"}


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        """Map float32 states (N, T, WIDTH) to the same shape; a position sees those before it."""
        n, t, _ = states.shape
        query, key, value = (
            part.view(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.query_key_value(states).split(WIDTH, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged: Tensor = self.output(mixed.transpose(1, 2).reshape(n, t, WIDTH))
        return merged


class Block(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Map float32 states (N, T, WIDTH) to the same shape."""
        states = states + self.attention(self.attention_norm(states))
        refined: Tensor = states + self.mlp(self.mlp_norm(states))
        return refined


class CharGPT(nn.Module):
    """A small GPT-2: learned positions, and one table for embedding and for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(ALPHABET), bias=False)
        self.apply(initialize)
        self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        """Map int64 characters (N, CONTEXT) to float32 logits of the next (N, CONTEXT, 97)."""
        places = torch.arange(characters.shape[1], device=characters.device)
        states = self.characters(characters) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(states)))
        return logits


def initialize(module: nn.Module) -> None:
    """Draw a layer's first weights: small enough that a block begins close to the identity."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model() -> nn.Module:
    """Train the network for 100 steps and return it in eval mode. Two calls give equal weights."""
    with torch.random.fork_rng(devices=[]):
        model = initial_model(SEED)
    optimize = optimizer(model.parameters())
    for _, (characters, following) in zip(range(BUILD_STEPS), train_batches(SEED), strict=False):
        optimize.zero_grad()
        loss(model(characters), following).backward()
        optimize.step()
    return model.eval()


def initial_model(seed: int) -> nn.Module:
    """Return the untrained network of a seed, which a comparison of training starts from."""
    torch.manual_seed(seed)
    return CharGPT()


def example_inputs() -> Tensor:
    """Return the first batch of test text, int64 (64, 64)."""
    characters, _ = next(iter(eval_batches()))
    return characters


def eval_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield eight batches from files that training never sees, spread evenly over their text.

    Inputs and targets are int64 (64, 64); a target is the character that follows.
    """
    text = read_text(TEST_FILES)
    count = EVAL_BATCHES * BATCH_SIZE
    starts = torch.arange(count) * ((len(text) - CONTEXT - 1) // count)
    for batch in starts.split(BATCH_SIZE):
        yield cut(text, batch)


def metrics(outputs: Tensor, target: Tensor) -> dict[str, float]:
    """Return how many bits a character of the target costs, given the logits (N, T, 97)."""
    nats = F.cross_entropy(outputs.double().flatten(0, 1), target.flatten()).item()
    return {"bits_per_character": nats / math.log(2)}


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield 300 batches from random places, which `seed` sets, of the training text."""
    text = read_text(TRAIN_FILES)
    places = torch.Generator().manual_seed(seed)
    for _ in range(TRAIN_STEPS):
        starts = torch.randint(len(text) - CONTEXT, (BATCH_SIZE,), generator=places)
        yield cut(text, starts)


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (N, T, 97) against characters (N, T), a scalar."""
    return F.cross_entropy(outputs.flatten(0, 1), target.flatten())


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, with the second momentum that small GPTs are commonly trained with."""
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def cut(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows of `text` at `starts` (N,), and those one further on, int64 (N, 64)."""
    windows = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


@cache
def read_text(modules: tuple[str, ...]) -> Tensor:
    """Return the source of these modules, one after the other, as indices into ALPHABET (L,)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in modules)
    index = {character: place for place, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, len(ALPHABET) - 1) for character in text])
