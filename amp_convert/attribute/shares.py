"""Dot products -> what each node adds to the squared error, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from amp_convert.attribute.adjoint import Projections
from amp_convert.attribute.local_errors import Site
from amp_convert.attribute.results import NodeShare


def rows_of(sites: Sequence[Site], projections: Projections) -> list[NodeShare]:
    """A row a node, by identity."""
    errors = _by_node(sites, projections.errors)
    floors, casts = (_by_node(sites, dots) for dots in (projections.floors, projections.casts))
    names = dict.fromkeys([site.node for site in sites])
    squares = {name: _squares(errors.get(name, [])) for name in names}
    owed = {name: _size(_squares(floors[name])) for name in floors}
    cast = {name: _size(_squares(casts[name])) for name in casts}
    sizes = {name: _size(found) for name, found in squares.items()}
    return [
        replace(
            row,
            standard_error=_standard_error(squares[row.node]),
            floor_rel_l2=owed.get(row.node),
            cast_rel_l2=cast.get(row.node),
        )
        for row in rows_of_sizes(sizes)
    ]


def rows_of_sizes(sizes: Mapping[str, float]) -> list[NodeShare]:
    """A row a node of what each adds, by identity; what the plan says of it is filled in later."""
    total = sum(size**2 for size in sizes.values())
    return [
        NodeShare(name, "", "", "", size, _share(size, total, list(sizes.values())), 0.0)
        for name, size in sizes.items()
    ]


def _by_node(
    sites: Sequence[Site], dots: Sequence[torch.Tensor | None]
) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for site, each in zip(sites, dots, strict=True):
        if each is not None:
            found.setdefault(site.node, []).append(each)
    return found


def _squares(dots: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a node adds to the squared error, for each vector: its parts are one error."""
    if not dots:
        return torch.zeros(1, dtype=torch.float64)
    return (_added(dots) ** 2).sum(1)


def _added(dots: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of dot products; by sample, where all of them are."""
    dots = list(dots)
    if len({found.shape[1] for found in dots}) > 1:
        dots = [found.sum(1, keepdim=True) for found in dots]
    return torch.stack(dots).sum(0)


def _size(squares: torch.Tensor) -> float:
    """The root of the mean; infinite where anything is not finite."""
    mean = float(squares.mean())
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _standard_error(squares: torch.Tensor) -> float:
    """That of the root of the mean over vectors, by the slope of the root."""
    mean = float(squares.mean())
    if len(squares) < 2 or not mean or not math.isfinite(mean):
        return 0.0
    return float(squares.std()) / math.sqrt(len(squares)) / (2 * math.sqrt(mean))


def _share(size: float, total: float, sizes: Sequence[float]) -> float:
    if math.isinf(total):  # those that overflow share it
        return 1 / sum(map(math.isinf, sizes)) if math.isinf(size) else 0.0
    return size**2 / total if total else 0.0


def signed(dots: Sequence[torch.Tensor | None]) -> float:
    """The predicted error of all sites together, signs kept."""
    held = [found for found in dots if found is not None]
    return _size((_added(held) ** 2).sum(1)) if held else 0.0
