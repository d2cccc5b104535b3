"""Flows, diffusion, and what samples."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, squares


@cache
def _moons() -> Tensor:
    points, _ = datasets.make_moons(4096, noise=0.08, random_state=0)
    return torch.tensor(points, dtype=torch.float32) - torch.tensor([0.5, 0.25])


def moons(g: torch.Generator) -> Batch:
    """Points of two half moons; there is no target."""
    points = _moons()
    return points[torch.randint(len(points), (256,), generator=g)], torch.zeros(256)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(found.target)


def digits(g: torch.Generator) -> Batch:
    """Images of digits from -1 to 1, and the same to be drawn again."""
    images, _ = _digits()
    chosen = images[torch.randint(len(images), (64,), generator=g)]
    return chosen, chosen


def noisy_digits(g: torch.Generator) -> Batch:
    """Noisy digits with their step of 1000 and their class, and the noise."""
    images, labels = _digits()
    rows = torch.randint(len(images), (32,), generator=g)
    steps = torch.randint(1000, (32,), generator=g)
    kept = kept_at(steps)[:, None, None, None]
    noise = torch.randn(32, 1, 8, 8, generator=g)
    noisy = kept.sqrt() * images[rows] + (1 - kept).sqrt() * noise
    return {"x": noisy, "t": steps, "label": labels[rows]}, noise


def kept_at(steps: Tensor) -> Tensor:
    """The share of the image that is left at a step."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[steps]


class Coupling(nn.Module):
    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).chunk(2, 1) if self.flip else x.chunk(2, 1)
        scale, shift = self.out(self.net(a)).chunk(2, 1)
        scale = scale.tanh()
        return torch.cat([a, b * scale.exp() + shift], 1), scale.sum(1)


class RealNvp(nn.Module):
    """Affine couplings; returns the code and the log of the volume's change."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(True) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = torch.zeros(len(x))
        for coupling in self.couplings:
            x, change = coupling(x)
            logdet = logdet + change
        return x, logdet


def likelihood(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    z, logdet = outputs
    return (0.5 * z.square().sum(1) + 0.5 * z.size(1) * math.log(2 * math.pi) - logdet).mean()


def walks(g: torch.Generator) -> Batch:
    """Random walks of eight steps; there is no target."""
    return 0.5 * torch.randn(128, 8, generator=g).cumsum(1) + 1, torch.zeros(128)


class LowerTriangular(nn.Module):
    """A linear flow: solves L z = x for a triangular L, after which it warps z monotonically."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.below = nn.Parameter(torch.zeros(size, size))
        self.size = nn.Parameter(torch.zeros(size))
        self.bends = nn.Parameter(torch.zeros(size, 7))
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.below.tril(-1) + torch.diag(self.size.exp())
        z = torch.linalg.solve_triangular(lower, (x - self.shift).T, upper=False).T
        widths = F.softplus(self.bends).cumsum(1) - 2
        steps = (z[..., None] - widths).sigmoid()
        warped = 0.5 * z + 0.3 * steps.sum(-1)
        slope = 0.5 + 0.3 * (steps * (1 - steps)).sum(-1)
        return warped, slope.log().sum(1) - self.size.sum()


class AutoregressiveFlow(nn.Module):
    """Each number is scaled and shifted by what a masked network makes of those before it."""

    first: Tensor
    last: Tensor

    def __init__(self, size: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.linear = LowerTriangular(size)
        self.one, self.two = nn.Linear(size, hidden), nn.Linear(hidden, 2 * size)
        order = torch.arange(hidden) % (size - 1)
        self.register_buffer("first", (torch.arange(size) <= order[:, None]).float())
        self.register_buffer("last", (order < torch.arange(size)[:, None]).float().repeat(2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self.linear(x)
        h = F.linear(z, self.one.weight * self.first, self.one.bias).relu()
        shift, scale = F.linear(h, self.two.weight * self.last, self.two.bias).chunk(2, 1)
        scale = scale.tanh()
        return (z - shift) * scale.exp(), logdet + scale.sum(1)


class Attend(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, size), nn.Conv2d(size, 3 * size, 1)
        self.out = nn.Conv2d(size, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = (q.transpose(1, 2) @ k * q.size(1) ** -0.5).softmax(-1)
        return x + self.out((v @ weights.transpose(1, 2)).view_as(x))


class TimedBlock(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.GroupNorm(4, i), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1))
        self.time = nn.Linear(64, 2 * o)
        self.norm, self.two = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(t))[..., None, None].chunk(2, 1)
        h = self.norm(self.one(x)) * (1 + scale) + shift
        return self.skip(x) + self.two(F.silu(h))


class DiffusionUnet(nn.Module):
    """Predicts noise from a noisy image, its step and its class, with attention in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.labels = nn.Conv2d(1, 16, 3, padding=1), nn.Embedding(10, 64)
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.down, self.mid = TimedBlock(16, 32), TimedBlock(32, 32)
        self.attend, self.up = Attend(32), TimedBlock(64, 16)
        self.end = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(16) / 16)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(label)
        one = self.down(self.start(x), time)
        two = self.attend(self.mid(F.avg_pool2d(one, 2), time))
        return self.end(self.up(torch.cat([one, F.interpolate(two, scale_factor=2.0)], 1), time))


class Ddim(nn.Module):
    """Draws images in ten steps from noise that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = DiffusionUnet()

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        x, steps = noise, torch.linspace(999, 0, 10).long()
        for now, after in pairwise(steps):
            kept, left = kept_at(now), kept_at(after)
            guess = self.unet(x, now.expand(len(x)), label)
            clean = ((x - (1 - kept).sqrt() * guess) / kept.sqrt()).clamp(-1, 1)
            x = left.sqrt() * clean + (1 - left).sqrt() * guess
        return x


def trained_ddim() -> nn.Module:
    """The sampler around a network that was trained a little."""
    trained = Kind("", "", DiffusionUnet, noisy_digits, squares, steps=150).trained()
    sampler = Ddim()
    sampler.unet.load_state_dict(trained.state_dict())
    return sampler


def noise_and_class(g: torch.Generator) -> Batch:
    return (torch.randn(4, 1, 8, 8, generator=g), torch.randint(10, (4,), generator=g)), None


class SamplingVae(nn.Module):
    """Draws its code in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = torch.distributions.Normal(mean, (0.5 * log_var).exp()).rsample()
        return self.decode(z).view_as(x), mean, log_var


def evidence(outputs: Any, target: Tensor) -> Tensor:
    image, mean, log_var = outputs
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
    return (image - target).square().sum((1, 2, 3)).mean() + kl


def gan_generator() -> nn.Module:
    """DCGAN's generator."""
    return nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, 1, 0, bias=False), nn.BatchNorm2d(64), nn.ReLU(True),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def codes(g: torch.Generator) -> Batch:
    return torch.randn(8, 32, 1, 1, generator=g), None


def diffusers_unet() -> nn.Module:
    """A UNet of diffusers."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip


def noisy_samples(g: torch.Generator) -> Batch:
    inputs, noise = noisy_digits(g)
    return {"sample": inputs["x"], "timestep": inputs["t"]}, noise


def sample_squares(outputs: Any, target: Tensor) -> Tensor:
    return F.mse_loss(outputs.sample, target)


KINDS = (
    Kind("flow-realnvp", "flow", RealNvp, moons, likelihood),
    Kind("flow-autoregressive", "flow", AutoregressiveFlow, walks, likelihood, rate=1e-2),
    Kind("diffusion-unet", "diffusion", DiffusionUnet, noisy_digits, squares),
    Kind("diffusion-ddim", "diffusion", trained_ddim, noise_and_class),
    Kind("diffusion-diffusers", "diffusion", diffusers_unet, noisy_samples, sample_squares,
         package="diffusers"),
    Kind("vae-samples", "generative", SamplingVae, digits, evidence),
    Kind("gan-generator", "generative", gan_generator, codes),
)  # fmt: skip
