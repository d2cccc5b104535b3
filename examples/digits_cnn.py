"""A small convolutional network for handwritten digits, trained on the spot in a few seconds.

The images are scikit-learn's digits: 1,797 real scans of 8 x 8 pixels, part of the package, so
nothing is downloaded. Every optional function of a model file is here; copy what you need.

Run it with `amp-convert examples/digits_cnn.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
EPOCHS = 12
TRAIN_BATCH = 64
TEST_BATCH = 60
TEST_IMAGES = 360

# Of the metrics below, those of which less is better.
lower_is_better = {"nll"}


class DigitsCNN(nn.Module):
    """Two stages of convolution, BatchNorm and in-place ReLU, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 images (N, 1, 8, 8) to float32 logits (N, 10)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def build_model() -> nn.Module:
    """Train the network and return it in eval mode. Two calls give the same weights."""
    with torch.random.fork_rng(devices=[]):
        model = initial_model(SEED)
    optimize = optimizer(model.parameters())
    for images, digits in train_batches(SEED):
        optimize.zero_grad()
        loss(model(images), digits).backward()
        optimize.step()
    return model.eval()


def initial_model(seed: int) -> nn.Module:
    """Return the untrained network of a seed, which a comparison of training starts from."""
    torch.manual_seed(seed)
    return DigitsCNN()


def example_inputs() -> Tensor:
    """Return a batch of test images, float32 (60, 1, 8, 8)."""
    images, _ = next(iter(eval_batches()))
    return images


def eval_batches() -> Iterable[tuple[Tensor, Tensor]]:
    """Return the 360 test images and their digits in six batches."""
    _, _, images, digits = split_digits()
    return zip(images.split(TEST_BATCH), digits.split(TEST_BATCH), strict=True)


def metrics(outputs: Tensor, target: Tensor) -> dict[str, float]:
    """Return the share of digits recognised and the mean negative log likelihood in nats."""
    return {
        "accuracy": (outputs.argmax(dim=1) == target).double().mean().item(),
        "nll": F.cross_entropy(outputs.double(), target).item(),
    }


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training images and their digits, twelve times over, in an order set by `seed`."""
    images, digits, _, _ = split_digits()
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=order).split(TRAIN_BATCH):
            yield images[batch], digits[batch]


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of the logits (N, 10) against the digits (N,), a scalar."""
    return F.cross_entropy(outputs, target)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, which reaches the accuracy in twelve passes over the images."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)


@cache
def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and digits, then test images and digits.

    Images are float32 (N, 1, 8, 8) from 0 to 1, digits are int64 (N,). Each digit has the same
    share in both parts.
    """
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(
        images, digits, test_size=TEST_IMAGES, stratify=digits, random_state=SEED
    )
    train_images, test_images = (
        torch.from_numpy(part).float().div(16).reshape(-1, 1, 8, 8) for part in parts[:2]
    )
    train_digits, test_digits = (torch.from_numpy(part).long() for part in parts[2:])
    return train_images, train_digits, test_images, test_digits
