"""How far a model's outputs are from a reference's: sums over batches, an output at a time.

Structure is compared both ways: an output, key or element that one arm has and the other has not
is a *misfit*, whatever the tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.core.slices import ClassSums, SliceKind, SliceSums
from amp_convert.core.tensor_errors import ErrorSums, Quantiles, larger
from amp_convert.core.tree_paths import named_leaves
from amp_convert.validate.inference.reordered import RowMatcher
from amp_convert.validate.inference.results import Misfit, OutputError

_MISSING = object()


class OutputSums:
    """The sums of one output over all batches."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = name_of(dtype) if dtype is not None else "object"
        self._errors, self._quantiles, self._slices = ErrorSums(), Quantiles(), SliceSums()
        self._noise: ErrorSums | None = None
        self._classes = ClassSums(SliceKind.CLASS)
        self._elements = self._mismatches = self._batches = 0
        self._nonfinite: int | None = None
        self._center: float | None = None
        self._deviation = 0.0
        self._misfits = 0
        self._misfit: Misfit | None = None
        self.rows = self.moved = 0

    def add(self, reference: torch.Tensor, value: object, noise: object = None) -> None:
        """Take in the reference's tensor and whatever stands in its place; `noise` is what FP32
        gives there once its inputs and weights are nudged."""
        self._batches += 1
        if not isinstance(value, torch.Tensor) or value.shape != reference.shape:
            # Another shape (a selection by value can do this) cannot be compared at all.
            self._misfits += 1
            self._misfit = self._misfit or _misfit(self._batches - 1, reference, value)
            self._elements += reference.numel()
            self._mismatches += reference.numel()
            self._errors.add_incomparable(reference.numel())
            return
        self._elements += reference.numel()
        if not isinstance(noise, torch.Tensor) or noise.shape != reference.shape:
            noise = None
        if not (reference.is_floating_point() or reference.is_complex()):
            self._mismatches += int((reference != value).sum())
            self._classes.add(reference, value, noise)
            return
        if reference.is_complex():
            lost = torch.isfinite(reference) & ~torch.isfinite(value)
            self._nonfinite = (self._nonfinite or 0) + int(lost.sum())
            reference, value = as_real(reference), as_real(value)
            noise = as_real(noise) if noise is not None else None
        self._errors.add(reference, value)
        self._quantiles.add(reference, value)
        self._slices.add(reference, value, noise)
        self._add_deviation(reference)
        if noise is not None:
            self._noise = self._noise or ErrorSums()
            self._noise.add(reference, noise)

    def _add_deviation(self, reference: torch.Tensor) -> None:
        values = reference.detach()
        if not values.numel():
            return
        ends = [float(end) for end in torch.aminmax(values)]
        if not all(map(math.isfinite, ends)):
            values = values[torch.isfinite(values)]
            ends = [float(end) for end in torch.aminmax(values)] if values.numel() else []
        if self._center is None and ends:
            self._center = float(values.mean(dtype=torch.float64))
        for end in ends:
            assert self._center is not None
            self._deviation = larger(self._deviation, abs(end - self._center))

    def differs(self, reference: object = _MISSING, value: object = _MISSING) -> None:
        """Take in a value that is no tensor and is not the reference's, or that only one has."""
        self._batches += 1
        self._elements += 1
        self._mismatches += 1
        if _MISSING in (reference, value):
            self._misfits += 1
            self._misfit = self._misfit or _misfit(self._batches - 1, reference, value)

    def row(self, name: str) -> OutputError:
        """What was summed up."""
        errors, noise, at = self._errors, self._noise, self._quantiles.at
        return OutputError(
            name=name,
            dtype=self._dtype,
            elements=self._elements,
            rel_l2=errors.rel_l2,
            cosine=errors.cosine,
            max_abs_err=errors.max_abs,
            ref_abs_max=errors.ref_abs_max,
            abs_err_p50=at(0.5),
            abs_err_p90=at(0.9),
            abs_err_p95=at(0.95),
            abs_err_p99=at(0.99),
            mismatches=self._mismatches,
            nonfinite=errors.nonfinite if self._nonfinite is None else self._nonfinite,
            ref_nonfinite=errors.ref_nonfinite,
            ref_deviation_max=self._deviation,
            slices=(*self._slices.slices(), *self._classes.slices()),
            misfits=self._misfits,
            misfit=self._misfit,
            rows=self.rows,
            moved=self.moved,
            noise_rel_l2=None if noise is None else noise.rel_l2,
            noise_max_abs=None if noise is None else noise.max_abs,
        )


def accumulate(
    sums: dict[str, OutputSums],
    reference: Any,
    value: Any,
    noise: Any = None,
    matcher: RowMatcher | None = None,
) -> None:
    """Add one batch's outputs, and those of the reference, to the sums by output name; `noise` are
    those of FP32 once its inputs and weights are nudged. Rows that changed places are put back by
    the `matcher`."""
    want, have, nudged = (dict(named_leaves(outputs)) for outputs in (reference, value, noise))
    moved: dict[str, tuple[int, int]] = {}
    if matcher is not None:
        have, moved = matcher.matched(want, have)
        nudged, _ = matcher.matched(want, nudged)
    for name, leaf in want.items():
        if isinstance(leaf, float) and isinstance(have.get(name), float):
            # A number that was taken out of a tensor. NaN is NaN here: it may stand for nothing.
            if not (math.isnan(leaf) and math.isnan(have[name])):
                number = torch.tensor([leaf], dtype=torch.float64)
                other = torch.tensor([have[name]], dtype=torch.float64)
                sums.setdefault(name, OutputSums(torch.float64)).add(number, other)
        elif isinstance(leaf, torch.Tensor):
            found = sums.setdefault(name, OutputSums(leaf.dtype))
            found.add(leaf, have.get(name, _MISSING), nudged.get(name))
        elif not _is_plain(leaf):  # an object that nobody but its class can look into
            sums.setdefault(name, OutputSums(None))
        elif name not in have:
            sums.setdefault(name, OutputSums(None)).differs(leaf)
        elif leaf != have[name]:
            sums.setdefault(name, OutputSums(None)).differs(leaf, have[name])
    for name in have.keys() - want.keys():
        sums.setdefault(name, OutputSums(None)).differs(value=have[name])
    for name, (rows, places) in moved.items():
        sums[name].rows += rows
        sums[name].moved += places


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj().resolve_neg())


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | complex | str | bytes | None)


def _misfit(batch: int, reference: object, value: object) -> Misfit:
    return Misfit(batch, _shape(reference), _shape(value))


def _shape(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if isinstance(value, torch.Tensor):
        return " x ".join(map(str, value.shape)) or "a number"
    return f"a {type(value).__name__}"


def same_bits(one: Any, other: Any) -> bool:
    """Whether two arms' outputs are the same in every bit; NaN is no bits to agree on."""
    mine, theirs = named_leaves(one), named_leaves(other)
    return [name for name, _ in mine] == [name for name, _ in theirs] and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for (_, a), (_, b) in zip(mine, theirs, strict=True)
        if isinstance(a, torch.Tensor)
    )
