"""Adjoints of random projections of the outputs, times the local errors: what each site adds.

For an output vector v of independent standard normal numbers, one backward pass through the FP32
graph gives at each site the adjoint g = Jᵀ v, J being the Jacobian of the outputs there. So g · e
is v · (J e), whose mean square over v is the squared norm of J e: what the site's error e does to
the outputs, to first order. A few v are enough, since the dot product is taken for each sample by
itself: samples do not meet, so each v is as good as one a sample. (The method of adjoint error
estimates, as in ADAPT and CHEF-FP, with random projections for a norm.)

Each adjoint is used where it appears and dropped: one pass holds no more than a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from amp_convert.attribute.local_errors import Site


@dataclass(frozen=True, eq=False)
class Target:
    """An output, the batch's norm of it in FP64, and its name."""

    name: str
    value: torch.Tensor
    norm: float


@dataclass(eq=False)
class Projections:
    """The dot products, a row a vector: `errors`, `floors` and `casts` by site, each of (vectors,
    samples), in FP64 on the CPU, None for a site without such an error. Where a site's first
    dimension is not made of samples there is one column."""

    errors: list[torch.Tensor | None]
    floors: list[torch.Tensor | None]
    casts: list[torch.Tensor | None]


Row = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""A vector's dot products at one site: of the error, of FP32's, and of a cast."""


class NoGradientError(Exception):
    """No gradient reaches an output from any site, or an operator has none."""


def project(
    sites: Sequence[Site], targets: Sequence[Target], samples: int, vectors: int, seed: int
) -> Projections:
    """Run `vectors` backward passes from the targets, each relative to its norm. Raises
    NoGradientError where there is none."""
    if sites and not any(target.value.requires_grad for target in targets):
        raise NoGradientError
    if not sites:
        return Projections([], [], [])
    coin = torch.Generator().manual_seed(seed)
    found: list[list[Row]] = [[] for _ in sites]
    handles = [_on_gradient(site, samples, rows) for site, rows in zip(sites, found, strict=True)]
    values = [target.value for target in targets]
    try:
        for index in range(vectors):
            cotangents = [
                (torch.randn(t.value.shape, generator=coin) / t.norm).to(t.value) for t in targets
            ]
            before = [len(rows) for rows in found]
            try:
                torch.autograd.backward(values, cotangents, retain_graph=index < vectors - 1)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise NoGradientError from error
            for site, rows, count in zip(sites, found, before, strict=True):
                if len(rows) == count:  # this site leads to no output
                    rows.append(_dots(site, torch.zeros_like(site.value), samples))
    finally:
        for handle in handles:
            handle.remove()
    return Projections(
        *([_stacked([row[kind] for row in rows]) for rows in found] for kind in range(3))
    )


def _on_gradient(site: Site, samples: int, rows: list[Row]) -> Any:
    """Take the site's adjoint when a backward pass makes it; gives what ends that."""
    if site.value.is_leaf:
        return site.value.register_post_accumulate_grad_hook(
            partial(_take_and_drop, site, samples, rows)
        )

    def take(gradient: torch.Tensor) -> None:
        rows.append(_dots(site, gradient, samples))

    return site.value.register_hook(take)


def _take_and_drop(site: Site, samples: int, rows: list[Row], leaf: torch.Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    rows.append(_dots(site, gradient, samples))


def _dots(site: Site, adjoint: torch.Tensor, samples: int) -> Row:
    error, floor, cast = (
        _dot(found, adjoint, samples) for found in (site.error, site.floor, site.cast)
    )
    return error, floor, cast


def _dot(error: torch.Tensor | None, adjoint: torch.Tensor, samples: int) -> torch.Tensor | None:
    """The dot product of each sample, or of all in one where the first dimension holds none."""
    if error is None:
        return None
    with torch.no_grad():
        product = (adjoint * error).double()
        apart = product.dim() > 0 and product.shape[0] % samples == 0
        return product.reshape(samples if apart else 1, -1).sum(1).cpu()


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    held = [row for row in rows if row is not None]
    return torch.stack(held) if held else None
