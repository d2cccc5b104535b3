"""Small models that are trained on real data: `HEALTHY` has one entry a model.

All data comes with installed packages: scikit-learn's digits, photographs and tables, the karate
club and Les Misérables of networkx, Python's own source for text, and the recording of a plucked
string that Python's tests carry. Each model is built anew for a seed, trained by `trained`, and has
eval batches that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.healthy_data import (
    Batch,
    Loss,
    Metrics,
    accuracy,
    classify,
    clean_digits,
    diffused_digits,
    digit_batch,
    error,
    evals,
    inked,
    karate_nodes,
    kind_of_line,
    loudness,
    meetings,
    mse,
    next_characters,
    noisy_digits,
    noisy_sound,
    reversed_words,
    table_batch,
)
from tests.benchmarks.healthy_nets import (
    CharModel,
    ConvNext,
    Deep,
    Factors,
    Gat,
    Gcn,
    Recurrent,
    Residual,
    Segmenter,
    Seq2seq,
    Sound,
    TabTransformer,
    TextCnn,
    TextEncoder,
    UNet,
    Vae,
    Vit,
    Wave,
    conv,
    elbo,
    mlp,
    pooled,
)


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


# --- data ----------------------------------------------------------------------------------------


# --- models --------------------------------------------------------------------------------------


# --- the list ------------------------------------------------------------------------------------

Make = Callable[..., Batch]


def _classifier(name: str, build: Callable[[], nn.Module], make: Make, **more: Any) -> Healthy:
    return Healthy(name, build, make, lambda: evals(make), classify, accuracy, **more)


def _regressor(name: str, build: Callable[[], nn.Module], make: Make, **more: Any) -> Healthy:
    return Healthy(name, build, make, lambda: evals(make), mse, error, ("mse",), **more)


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
        "digits-vae", Vae, clean_digits, lambda: evals(clean_digits), elbo, _vae_error, ("mse",)
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
