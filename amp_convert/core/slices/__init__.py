"""The worst slice of an output: which channel, which sample, which class is furthest off?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.core.slices.classes import ClassSums as ClassSums
    from amp_convert.core.slices.slice_error import LEAST as LEAST
    from amp_convert.core.slices.slice_error import SILENT as SILENT
    from amp_convert.core.slices.slice_error import SliceError as SliceError
    from amp_convert.core.slices.slice_error import SliceKind as SliceKind
    from amp_convert.core.slices.slice_error import frontier as frontier
    from amp_convert.core.slices.sums import SliceSums as SliceSums

__getattr__, __all__ = names_in(
    __name__,
    classes="ClassSums",
    slice_error="LEAST SILENT SliceError SliceKind frontier",
    sums="SliceSums",
)
