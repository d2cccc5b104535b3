"""How far a model's outputs are from a reference's: sums over batches, an output at a time."""

from __future__ import annotations

from typing import Any

import torch

from amp_convert.core.number_formats import name_of
from amp_convert.core.tensor_errors import ErrorSums, Quantiles
from amp_convert.loading.model_file import named_leaves
from amp_convert.validate.inference.results import OutputError


class OutputSums:
    """The sums of one output over all batches."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = name_of(dtype) if dtype is not None else "object"
        self._errors, self._quantiles = ErrorSums(), Quantiles()
        self._elements = self._mismatches = 0

    def add(self, reference: torch.Tensor, value: object) -> None:
        """Take in the reference's tensor and whatever stands in its place."""
        self._elements += reference.numel()
        if not isinstance(value, torch.Tensor) or value.shape != reference.shape:
            # Another shape (a selection by value can do this) cannot be compared at all.
            self._mismatches += reference.numel()
            self._errors.add_incomparable(reference.numel())
            return
        if reference.is_complex():
            reference, value = torch.view_as_real(reference), torch.view_as_real(value)
        if reference.is_floating_point():
            self._errors.add(reference, value)
            self._quantiles.add(reference, value)
        else:
            self._mismatches += int((reference != value).sum())

    def differs(self) -> None:
        """Take in a value that is no tensor and is not the reference's."""
        self._elements += 1
        self._mismatches += 1

    def row(self, name: str) -> OutputError:
        """What was summed up."""
        errors, at = self._errors, self._quantiles.at
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
            nonfinite=errors.nonfinite,
            ref_nonfinite=errors.ref_nonfinite,
        )


def accumulate(sums: dict[str, OutputSums], reference: Any, value: Any) -> None:
    """Add one batch's outputs, and those of the reference, to the sums by output name."""
    have = dict(named_leaves(value))
    for name, want in named_leaves(reference):
        if not isinstance(want, torch.Tensor):
            plain = isinstance(want, int | float | complex | str | bytes | None)
            if not plain:  # an object that nobody but its class can look into
                sums.setdefault(name, OutputSums(None))
            elif want != have.get(name):
                sums.setdefault(name, OutputSums(None)).differs()
        else:
            sums.setdefault(name, OutputSums(want.dtype)).add(want, have.get(name))
