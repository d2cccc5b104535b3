"""The sums that give each slice of an output its error.

One relative error over a tensor hides whatever is small beside the rest: a channel, a sample, a
class. So the error of each slice is divided by that slice's own *spread*, the norm of its reference
with the mean taken off: an error of 1 is as large as everything that the slice says. With
reference r, value m, and n elements in the slice, error = ‖m - r‖ / sqrt(Σr² - (Σr)² / n).

A channel is an index of a dimension other than the first, of a size that stays the same and is at
most `MOST_CHANNELS`; it takes in all batches. A sample is an index of the first dimension of one
batch. The whole output is a slice as well. A channel is *faint* where its spread is under `FAINT`
of the median channel's, a sample under `FLAT` of the median sample's. Below `LEAST` elements a
spread is a guess: then the median of such channels counts where it is larger, and the slice can
show that something is wrong, but nothing that is right. A class is a value of an integer output, or
an index that is largest along the axis of an output's classes; its error is the share of its
elements that have another class in `m`.

Each slice has a second error, its *noise*: that of FP32 itself, from inputs and weights nudged by
one ULP. Which slices such noise excuses depends on a tolerance that is not known here, so what is
kept of a kind is its frontier: every slice that is worse than all slices of less noise. Sums are
in FP64, blocks of a bounded size at a time, and nothing grows with the number of batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from amp_convert.core.slices.classes import ClassSums
from amp_convert.core.slices.slice_error import (
    FAINT,
    FLAT,
    LEAST,
    MOST_CHANNELS,
    SILENT,
    SliceError,
    SliceKind,
    frontier,
)
from amp_convert.core.tensor_errors import CHUNK

_COUNT, _SUM, _SQUARES, _ERROR, _NOISE = range(5)


_FAINT = {
    SliceKind.CHANNEL: (FAINT, SliceKind.FAINT_CHANNEL),
    SliceKind.SAMPLE: (FLAT, SliceKind.FAINT_SAMPLE),
}


class SliceSums:
    """The slices of one floating point output over all batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._sizes: tuple[int, ...] | None = None
        self._channels: dict[int, torch.Tensor] = {}
        self._whole = torch.zeros(5, dtype=torch.float64)
        self._samples: list[SliceError] = []
        self._classes: dict[int, ClassSums] = {}

    def add(
        self, reference: torch.Tensor, value: torch.Tensor, noise: torch.Tensor | None = None
    ) -> None:
        """Take in one batch of real tensors of one shape; `noise` is what FP32 gives once its
        inputs and weights are nudged."""
        reference, value = (t.detach().reshape(t.shape or (1,)) for t in (reference, value))
        if noise is not None:
            noise = noise.detach().reshape(reference.shape)
        shape = tuple(reference.shape)
        self._keep_fixed(shape)
        samples = torch.zeros(shape[0], 5, dtype=torch.float64)
        for block in _blocks(shape):
            sums = _terms(reference[block], value[block], None if noise is None else noise[block])
            for dim, channels in self._channels.items():
                channels[block[dim]] += _by_index(sums, dim)
            samples[block[0]] += _by_index(sums, 0)
        self._whole += samples.sum(0)
        found = [*self._samples, *_slices(SliceKind.SAMPLE, samples, None, self._batches)]
        self._samples = [
            each
            for kind in (SliceKind.SAMPLE, SliceKind.FAINT_SAMPLE)
            for each in frontier([row for row in found if row.kind is kind])
        ]
        self._add_classes(reference, value, noise)
        self._batches += 1

    def _keep_fixed(self, shape: tuple[int, ...]) -> None:
        """Drop the dimensions whose size has changed."""
        if self._sizes is None:
            self._sizes = shape
            self._channels = {
                dim: torch.zeros(size, 5, dtype=torch.float64)
                for dim, size in enumerate(shape)
                if dim and 1 < size <= MOST_CHANNELS
            }
        for dim in list(self._channels):
            if dim >= len(shape) or shape[dim] != self._sizes[dim]:
                del self._channels[dim]

    def _add_classes(
        self, reference: torch.Tensor, value: torch.Tensor, noise: torch.Tensor | None
    ) -> None:
        """The axis of the classes is the second one, or the last."""
        for axis in {1, reference.dim() - 1} & self._channels.keys():
            if reference.numel():
                sums = self._classes.setdefault(axis, ClassSums(SliceKind.LARGEST, axis))
                other = None if noise is None else noise.argmax(axis)
                sums.add(reference.argmax(axis), value.argmax(axis), other)

    def slices(self) -> tuple[SliceError, ...]:
        """The frontier of each kind, the worst of a kind first."""
        rows = _slices(SliceKind.WHOLE, self._whole[None], None, None)
        for dim, sums in self._channels.items():
            rows += _slices(SliceKind.CHANNEL, sums, dim, None)
        rows += self._samples
        kinds = dict.fromkeys(row.kind for row in rows)
        found = [each for kind in kinds for each in frontier([r for r in rows if r.kind is kind])]
        classes = [row for sums in self._classes.values() for row in sums.slices()]
        return (*found, *classes)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Index ranges that cover a shape, each of at most about `CHUNK` elements."""
    if 0 in shape:
        return
    steps, room = list(shape), CHUNK
    for dim in reversed(range(len(shape))):
        steps[dim] = max(1, min(shape[dim], room))
        room //= steps[dim]
    starts = torch.cartesian_prod(
        *(torch.arange(0, n, step) for n, step in zip(shape, steps, strict=True))
    ).reshape(-1, len(shape))
    for start in starts.tolist():
        yield tuple(slice(a, a + step) for a, step in zip(start, steps, strict=True))


def _terms(
    reference: torch.Tensor, value: torch.Tensor, noise: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """What is added up of each element, in FP64: itself, its square, and the squared errors. An
    element whose reference is not finite, and is what the value is, does not count; the first of
    the terms is then whether an element counts."""
    want = reference.double()
    # Copies: FP64 outputs may be the user's own data.
    errors = [None if other is None else other.double() - want for other in (value, noise)]
    counts = None
    if not bool(torch.isfinite(want).all()):
        same = torch.isnan(want) | (torch.isinf(want) & (reference == value))
        counts = (~same).double()
        want = want.masked_fill(same, 0)
        errors = [None if error is None else error.masked_fill(same, 0) for error in errors]
    squares = [None if error is None else error.square_() for error in errors]
    return (counts, want, want.square(), *squares)


def _by_index(terms: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor:
    """The sums of the terms for each index of a dimension: (indices, 5) on the CPU."""
    like = terms[1]
    assert like is not None
    others = [d for d in range(like.dim()) if d != dim]
    size, per_index = like.shape[dim], like.numel() / like.shape[dim]
    columns = []
    for at, term in enumerate(terms):
        if term is not None:
            columns.append(term.sum(others) if others else term)
        else:
            fill = per_index if at == _COUNT else 0.0
            columns.append(torch.full((size,), fill, dtype=torch.float64, device=like.device))
    return torch.stack(columns, 1).cpu()


def _slices(
    kind: SliceKind, sums: torch.Tensor, dim: int | None, batch: int | None
) -> list[SliceError]:
    """The frontier of the slices that a table of sums holds, one a row."""
    count, total, squares, error, noise = sums.unbind(1)
    # The sums cancel where a slice is all one value: what is left there is FP64's own rounding.
    centred = squares - total.square() / count.clamp(min=1)
    centred = torch.where(centred > squares * count.sqrt() * 2.0**-50, centred, 0.0)
    spreads = (centred / count.clamp(min=1)).sqrt()
    found: list[SliceError] = []

    def add(name: SliceKind, mask: torch.Tensor, scale: torch.Tensor) -> None:
        errors, noises = (_ratio(each, scale) for each in (error, noise))
        found.extend(
            SliceError(name, i, float(errors[i]), float(noises[i]), int(count[i]), dim, batch)
            for i in _frontier_rows(errors, noises, mask)
        )

    enough = count >= LEAST
    if bool(enough.any()):
        limit, hidden = _FAINT.get(kind, (0.0, kind))
        faint = enough & (spreads < limit * spreads[enough].median())
        add(kind, enough & ~faint, centred)
        add(hidden, faint, centred)
    few = (count > 1) & ~enough
    if kind is not SliceKind.SAMPLE and bool(few.any()):
        # By chance a few numbers lie close together: then those of the other channels count.
        typical = spreads[few].median().square() * count
        add(SliceKind.FEW, few, torch.maximum(centred, typical))
    return found


def _frontier_rows(errors: torch.Tensor, noises: torch.Tensor, chosen: torch.Tensor) -> list[int]:
    """The rows of the frontier among those that are chosen."""
    rows = torch.nonzero(chosen).flatten()
    if not len(rows):
        return []
    size, noise = (t[rows].nan_to_num(nan=math.inf, posinf=math.inf) for t in (errors, noises))
    noise = noise.clamp(min=SILENT)
    order = torch.argsort(noise, stable=True)
    order = order[torch.argsort(size[order], descending=True, stable=True)]
    sorted_noise = noise[order]
    before = torch.cummin(sorted_noise, 0).values.roll(1)
    before[0] = math.inf
    kept = sorted_noise < before
    kept[0] = True
    return [int(row) for row in rows[order[kept]]]


def _ratio(error: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """The root of the quotient; 0 where nothing differs, infinite where only the reference does
    not."""
    quotient = (error / centred).sqrt()
    return torch.where((error == 0) & (centred == 0), 0.0, quotient)
