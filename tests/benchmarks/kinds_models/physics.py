"""Physics: derivatives, solvers, operators and rays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, squares


def places(g: torch.Generator) -> Batch:
    """Points between 0 and 1."""
    return torch.rand(64, 1, generator=g), torch.zeros(64, 1)


class Pinn(nn.Module):
    """Solves u'' = -pi^2 sin(pi x): returns u and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.requires_grad_()
            u = x * (1 - x) * self.net(x)
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
            return u, second + torch.pi**2 * (torch.pi * x).sin()


def residual(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(outputs[1], target)


def orbits(g: torch.Generator) -> Batch:
    """Where a damped pendulum starts, and where it is after a second."""
    start = torch.randn(32, 2, generator=g)
    x = start
    for _ in range(100):
        x = x + 0.01 * torch.stack([x[:, 1], -3 * x[:, 0].sin() - 0.2 * x[:, 1]], 1)
    return start, x


class NeuralOde(nn.Module):
    """Heun's method with a step that follows the error."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x: Tensor, end: float = 1.0, tolerance: float = 1e-3) -> Tensor:
        t, step = 0.0, 0.2
        while t < end:
            step = min(step, end - t)
            one = self.field(x)
            two = self.field(x + step * one)
            error = (0.5 * step * (two - one)).abs().max().item()
            if error < tolerance or step < 0.01:
                x, t = x + 0.5 * step * (one + two), t + step
            step *= min(2.0, max(0.3, 0.9 * (tolerance / (error + 1e-12)) ** 0.5))
        return x


def heat(g: torch.Generator) -> Batch:
    """A temperature on a ring, and what is left of it after a while."""
    size = torch.randn(16, 8, generator=g) / torch.arange(1, 9)
    waves = torch.arange(64) / 64 * 2 * torch.pi * torch.arange(1, 9)[:, None]
    decay = torch.exp(-0.05 * torch.arange(1, 9) ** 2)
    return (size @ waves.sin())[..., None], ((size * decay) @ waves.sin())[..., None]


class SpectralConv(nn.Module):
    def __init__(self, size: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(size, size, modes, dtype=torch.cfloat) / size**2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        low = spectrum[..., : self.modes]
        out[..., : self.modes] = torch.einsum("bix,iox->box", low, self.weight)
        return torch.fft.irfft(out, n=x.size(-1))


class Fno(nn.Module):
    """A Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 16)
        self.spectral = nn.ModuleList(SpectralConv(16, 10) for _ in range(3))
        self.local = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.size(1))[None, :, None].expand_as(x)
        h = self.lift(torch.cat([x, grid], -1)).transpose(1, 2)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            h = F.gelu(spectral(h) + local(h))
        return self.out(h.transpose(1, 2))


def rays(g: torch.Generator) -> Batch:
    """Rays from around a coloured ball, and the colours that they meet."""
    origin = 3 * F.normalize(torch.randn(64, 3, generator=g), dim=1)
    direction = F.normalize(0.8 * torch.randn(64, 3, generator=g) - origin, dim=1)
    along = -(origin * direction).sum(1)
    gap = (origin + along[:, None] * direction).square().sum(1)
    depth = along - (1 - gap).clamp(min=0).sqrt()
    colour = 0.5 + 0.5 * (origin + depth[:, None] * direction)
    return (origin, direction), torch.where((gap < 1)[:, None], colour, torch.zeros(3))


class Nerf(nn.Module):
    """Density and colour along a ray, added up behind what is in front."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(39, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64 + 3, 3)

    def forward(self, origin: Tensor, direction: Tensor) -> Tensor:
        depth = torch.linspace(1.5, 4.5, 32)
        points = origin[:, None] + depth[:, None] * direction[:, None]
        angles = (points[..., None] * 2.0 ** torch.arange(6)).flatten(2)
        h = self.body(torch.cat([points, angles.sin(), angles.cos()], -1))
        density = F.softplus(self.density(h))[..., 0]
        views = direction[:, None].expand(-1, 32, -1)
        colour = self.colour(torch.cat([h, views], -1)).sigmoid()
        gaps = torch.cat([depth.diff(), torch.tensor([1e10])])
        alpha = 1 - torch.exp(-density * gaps)
        clear = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)
        return ((alpha * clear[:, :-1])[..., None] * colour).sum(1)


def sums_of_sines(g: torch.Generator) -> Batch:
    x = torch.randn(64, 8, generator=g)
    return x, x.sin().cumsum(1)


class Equilibrium(nn.Module):
    """Looks for a fixed point, and differentiates one step at it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self.outer, self.head = nn.Linear(8, 32), nn.Linear(32, 8)
        nn.init.orthogonal_(self.inner.weight, gain=0.7)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return (self.inner(z) + self.outer(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), 32)
        with torch.no_grad():
            for _ in range(100):
                new = self.step(z, x)
                moved = (new - z).norm() / (new.norm() + 1e-8)
                z = new
                if moved < 1e-4:
                    break
        return self.head(self.step(z, x))


KINDS = (
    Kind("pinn-poisson", "physics", Pinn, places, residual),
    Kind("neural-ode-adaptive", "physics", NeuralOde, orbits, squares, rate=1e-2),
    Kind("fno-heat", "physics", Fno, heat, squares),
    Kind("nerf-rays", "physics", Nerf, rays, squares),
    Kind("equilibrium-deq", "control flow", Equilibrium, sums_of_sines, squares),
)
