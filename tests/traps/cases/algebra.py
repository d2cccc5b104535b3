"""Transforms, linear algebra and iterations for which low precision has no kernel or no digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, Built, Net, conv, linear, trap


@trap(H16 | HB16, share=0.99)
def fourier_mixing() -> Built:
    """FNet: the real part of a Fourier transform between two linear layers."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = torch.fft.fft2(net.first(x)).real
        return net.last(h / 12)

    return Net(compute, first=linear(8, 16), last=linear(16, 4)), (torch.randn(2, 9, 8),)


@trap(H16 | HB16, share=0.9)
def fourier_neural_operator() -> Built:
    """Complex weights on the low modes."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.lift(x)
        modes = torch.fft.rfft2(h)[..., :4, :4]
        weight = torch.view_as_complex(net.weight)
        mixed = (modes[:, :, None] * weight).sum(1)
        full = F.pad(mixed, (0, 1, 0, 4))
        return net.last(F.gelu(h + torch.fft.irfft2(full, s=(8, 8))))

    weight = nn.Parameter(torch.randn(8, 8, 4, 4, 2) * 0.3)
    return Net(compute, lift=conv(2, 8), last=conv(8, 1), weight=weight), (torch.randn(2, 2, 8, 8),)


@trap(H16 | HB16, share=0.9)
def whitening_by_cholesky() -> Built:
    """A covariance, its factor and a triangular solve."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        h = h - h.mean(0)
        covariance = h.t() @ h / (len(h) - 1) + 1e-3 * torch.eye(8, dtype=h.dtype)
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, h.t(), upper=False).t()
        return net.last(torch.relu(net.hidden(white)))

    parts = {"first": linear(8, 8), "hidden": linear(8, 64), "last": linear(64, 16)}
    return Net(compute, **parts), (torch.randn(64, 8),)


@trap(H16 | HB16, share=0.9)
def ridge_regression_head() -> Built:
    """Few-shot learning by a closed form: a solve with entries far from one."""

    def compute(
        net: nn.Module, support: torch.Tensor, label: torch.Tensor, query: torch.Tensor
    ) -> Any:
        a, b = net.embed(support), net.embed(query)
        gram = a.t() @ a + 10 * torch.eye(8, dtype=a.dtype)
        return net.out(b @ torch.linalg.solve(gram, a.t() @ label))

    parts = {"embed": nn.Sequential(linear(16, 64, 8.0), nn.Tanh(), linear(64, 8, 8.0, bias=False))}
    data = (torch.randn(40, 16), torch.randn(40, 3), torch.randn(10, 16))
    return Net(compute, out=linear(3, 3), **parts), data


@trap(A16 | H16, share=0.7)
def newton_iteration_for_a_root() -> Built:
    """The square root of covariances by Newton and Schulz, as iSQRT-COV does."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        covariance = h.transpose(1, 2) @ h
        trace = covariance.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        eye = torch.eye(8, dtype=h.dtype)
        y, z = covariance / trace, eye.expand_as(covariance)
        for _ in range(6):
            t = 0.5 * (3 * eye - z @ y)
            y, z = y @ t, t @ z
        return net.last((y * torch.sqrt(trace)).flatten(1) / 300)

    return Net(compute, first=linear(8, 8, 40.0), last=linear(64, 4)), (torch.randn(2, 64, 8),)


@trap(A16 | H16, share=0.99)
def newton_iteration_for_a_reciprocal_root() -> Built:
    """y ← y(1.5 - 0.5xy²) for x around 1e5."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        power = (h * h).sum(-1, keepdim=True)
        y = torch.full_like(power, 1e-4)
        for _ in range(12):
            y = y * (1.5 - 0.5 * power * y * y)
        return net.last(h * y * 5)

    return Net(compute, first=linear(16, 32, 100.0), last=linear(32, 4)), (torch.randn(6, 16),)


@trap(A16 | H16 | AB16 | HB16, share=0.9)
def long_accumulation_in_a_recurrence() -> Built:
    """A state near 1000 to which each of 32 steps adds a little."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        step = torch.sigmoid(net.step(x)) * 0.2
        state = torch.full_like(step[:, 0], 1000.0)
        for t in range(32):
            state = state + step[:, t]
        return net.out((state - 1003.2) * 3)

    return Net(compute, step=linear(8, 16), out=linear(16, 8)), (
        torch.randn(2, 32, 8) + torch.randn(2, 1, 8),
    )


@trap(A16 | H16 | AB16 | HB16, share=0.9)
def counters_of_a_stack_machine() -> Built:
    """A gated counter: an LSTM cell by hand whose memory grows beyond FP16's whole numbers."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gates = net.gates(x)
        memory = torch.full_like(gates[:, 0, :8], 2048.0)
        seen = []
        for t in range(16):
            write, read = torch.sigmoid(gates[:, t]).chunk(2, -1)
            memory = memory + write
            seen.append(torch.sin(memory) * read)
        return net.out(torch.stack(seen, 1))

    return Net(compute, gates=linear(8, 16), out=linear(8, 8)), (torch.randn(2, 16, 8),)
