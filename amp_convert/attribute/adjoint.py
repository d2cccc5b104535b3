"""Adjoints of random projections of the outputs, times the local errors: what each site adds.

For an output vector v of independent standard normal numbers, one backward pass through the FP32
graph gives at each site the adjoint g = Jᵀ v, J being the Jacobian of the outputs there. So g · e
is v · (J e), whose mean square over v is the squared norm of J e: what the site's error e does to
the outputs, to first order. A few v are enough, since the dot product is taken for each sample by
itself: where samples do not meet, each v is as good as one a sample. (The method of adjoint error
estimates, as in ADAPT and CHEF-FP, with random projections for a norm.)

Each adjoint is used where it appears and dropped: one pass holds no more than a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from amp_convert.attribute.local_errors import Site


@dataclass(frozen=True, eq=False)
class Target:
    """An output, a complex one as pairs of reals, its name, and the batch's norm of what is finite
    in it, in FP64."""

    name: str
    value: torch.Tensor
    norm: float


@dataclass(eq=False)
class Projections:
    """The dot products, a row a vector: `errors`, `floors` and `casts` by site, each of (vectors,
    samples), in FP64 on the CPU, None for a site without such an error. Where samples meet behind a
    site there is one column."""

    errors: list[torch.Tensor | None]
    floors: list[torch.Tensor | None]
    casts: list[torch.Tensor | None]

    @property
    def vectors(self) -> int:
        """How many backward passes there were; 0 without a site."""
        held = (dots for dots in (*self.errors, *self.floors, *self.casts) if dots is not None)
        return next((len(dots) for dots in held), 0)


Row = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""A vector's dot products at one site: of the error, of FP32's, and of a cast."""


class NoGradientError(Exception):
    """No gradient reaches an output from any site, or an operator has none."""


def project(
    sites: Sequence[Site], targets: Sequence[Target], samples: int, vectors: int, seed: int
) -> Projections:
    """Run `vectors` backward passes from the targets, each relative to its norm. Where samples meet
    on their way, as in a mean over them, no dot product can be split; where that is much of the
    error, there are four times as many passes. Either all targets have a gradient, or none has:
    then NoGradientError is raised."""
    if not sites:
        return Projections([], [], [])
    if not all(target.value.requires_grad for target in targets):
        raise NoGradientError
    passes = _Passes(sites, targets)
    apart = passes.apart(samples)
    coin = torch.Generator().manual_seed(seed)
    found: list[list[Row]] = [[] for _ in sites]

    def take(index: int, adjoint: torch.Tensor | None) -> None:
        site = sites[index]
        known = torch.zeros_like(site.value) if adjoint is None else adjoint
        found[index].append(_dots(site, known, samples if apart[index] else 1))

    def run(count: int) -> None:
        for _ in range(count):
            passes.run([torch.randn(t.value.shape, generator=coin) for t in targets], take)

    run(vectors)
    if samples > 1 and _share_that_meets(found, apart) > _LITTLE:
        run(max(min(4 * vectors, _MOST) - vectors, 0))
    return Projections(
        *([_stacked([row[kind] for row in rows]) for rows in found] for kind in range(3))
    )


def _share_that_meets(found: Sequence[Sequence[Row]], apart: Sequence[bool]) -> float:
    """Of the squared error, the share of the sites behind which samples meet."""
    sizes = [
        sum(float((row[0] ** 2).sum()) for row in rows if row[0] is not None) for rows in found
    ]
    together = sum(size for size, split in zip(sizes, apart, strict=True) if not split)
    total = sum(sizes)
    return together / total if total and math.isfinite(total) else 0.0


_MOST, _LITTLE = 64, 0.1
"""How many backward passes there are at most where samples meet, and which share of the error is
too little to ask for more of them."""
Take = Callable[[int, torch.Tensor | None], None]
"""Gets a site's number and its adjoint, None for a site that leads to no output."""


class _Passes:
    """Backward passes from the targets; each site's adjoint is handed on once in a pass."""

    def __init__(self, sites: Sequence[Site], targets: Sequence[Target]) -> None:
        self._sites, self._targets = sites, targets

    def run(self, vectors: Sequence[torch.Tensor], take: Take) -> None:
        """One pass from vectors of the shapes of the targets, each relative to the target's
        norm."""
        taken: set[int] = set()

        def once(index: int, adjoint: torch.Tensor | None) -> None:
            if adjoint is not None:
                taken.add(index)
                take(index, adjoint)

        cotangents = [
            _cotangent(vector, target)
            for vector, target in zip(vectors, self._targets, strict=True)
        ]
        handles = [_on_gradient(site, partial(once, i)) for i, site in enumerate(self._sites)]
        values = [target.value for target in self._targets]
        try:
            torch.autograd.backward(values, cotangents, retain_graph=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise NoGradientError from error
        finally:
            for handle in handles:
                handle.remove()
        for index in set(range(len(self._sites))) - taken:
            take(index, None)

    def apart(self, samples: int) -> list[bool]:
        """Of each site, whether samples do not meet behind it: a vector on the first sample of the
        outputs alone gives it an adjoint in its own first sample alone."""
        found = [True] * len(self._sites)
        if samples < 2:
            return found
        if any(not t.value.dim() or t.value.shape[0] != samples for t in self._targets):
            return [False] * len(self._sites)

        def take(index: int, adjoint: torch.Tensor | None) -> None:
            if adjoint is None:
                return
            split = adjoint.dim() > 0 and adjoint.shape[0] % samples == 0
            others = adjoint.reshape(samples, -1)[1:] if split else None
            found[index] = others is not None and not bool(others.count_nonzero())

        # Of numbers drawn at random: those that are equal may cancel behind the site.
        coin = torch.Generator().manual_seed(0)
        first = [torch.zeros(target.value.shape) for target in self._targets]
        for vector in first:
            vector[0] = torch.randn(vector.shape[1:], generator=coin)
        self.run(first, take)
        return found


def _cotangent(vector: torch.Tensor, target: Target) -> torch.Tensor:
    """The vector relative to the target's norm, without the places where the target is not
    finite."""
    scaled = (vector.double() / target.norm).to(target.value)
    return torch.where(target.value.detach().isfinite(), scaled, torch.zeros_like(scaled))


def _on_gradient(site: Site, take: Callable[[torch.Tensor | None], None]) -> Any:
    """Take the site's adjoint when a backward pass makes it, None for one that is not defined, as
    of a result that nobody reads; gives what ends that."""
    if not site.value.is_leaf:

        def taken(gradient: torch.Tensor | None) -> None:
            take(gradient)

        return site.value.register_hook(taken)

    def dropped(leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        take(gradient)

    return site.value.register_post_accumulate_grad_hook(dropped)


def _dots(site: Site, adjoint: torch.Tensor, samples: int) -> Row:
    error, floor, cast = (
        _dot(found, adjoint, samples) for found in (site.error, site.floor, site.cast)
    )
    return error, floor, cast


def _dot(error: torch.Tensor | None, adjoint: torch.Tensor, samples: int) -> torch.Tensor | None:
    """The dot product of each sample; of all in one where `samples` is 1."""
    if error is None:
        return None
    with torch.no_grad():
        return (adjoint * error).double().reshape(samples, -1).sum(1).cpu()


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    held = [row for row in rows if row is not None]
    return torch.stack(held) if held else None
