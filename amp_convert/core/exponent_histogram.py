"""Which powers of two lie a tensor's values between? Histograms of exponents, streaming.

FP16 has no number between 0 and 2**-24, and only subnormal ones, with fewer digits, under 2**-14. A
histogram of floor(log2 |x|) therefore says what FP16 would lose of some values. A scale of 2**k
moves every exponent by k, so the same histogram also says what it would lose of the scaled values,
and which scale to use: see `recommend_scale`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from amp_convert.core.errors import UsageError
from amp_convert.core.tensor_errors import chunks, larger

TINIEST = -24
"""The exponent of FP16's smallest number."""
SMALLEST_NORMAL = -14
"""The exponent of FP16's smallest number with all its digits."""
HEAD_ROOM = 2.0
"""By how much gradients may grow before they overflow at the recommended scale: the batches that
follow differ from the one that was measured, and FP16 rounds upwards as often as downwards."""

_LARGEST, _FP32_LARGEST = (float(torch.finfo(d).max) for d in (torch.float16, torch.float32))
_BINS_FROM = -1100  # under FP64's lowest exponent, so that 0 can have the first bin
_BINS = 1 - 2 * _BINS_FROM


@dataclass(frozen=True)
class ExponentHistogram:
    """How many values have which exponent.

    `counts` has floor(log2 |x|) of the values that are neither zero nor non-finite; those two are
    counted apart. `abs_max` is the largest magnitude, NaN if any value is NaN.
    """

    elements: int
    zeros: int
    nonfinite: int
    abs_max: float
    counts: Mapping[int, int] = field(repr=False)

    def share_under(self, exponent: int, scale: float = 1.0) -> float | None:
        """The share of values x with |x| · `scale` < 2**`exponent` among those in `counts`; None
        when there are none. `scale` is a power of two."""
        total = sum(self.counts.values())
        limit = exponent - log2(scale)
        under = sum(count for found, count in self.counts.items() if found < limit)
        return under / total if total else None


@dataclass
class Exponents:
    """A histogram in the making."""

    elements: int = 0
    nonfinite: int = 0
    zeros: int = 0
    abs_max: float = 0.0
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, tensor: torch.Tensor) -> None:
        """Take in a real floating point tensor."""
        self.elements += tensor.numel()
        for chunk, _ in chunks(tensor, tensor):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            self.abs_max = larger(self.abs_max, float(wide.abs().max()))
            # frexp: |x| = m · 2**e with m in [0.5, 1), subnormal numbers included.
            bins = torch.frexp(wide).exponent - (1 + _BINS_FROM)
            bins.masked_fill_(wide == 0, 0).masked_fill_(~torch.isfinite(wide), _BINS - 1)
            counts = torch.bincount(bins, minlength=_BINS).cpu()
            self.zeros += int(counts[0])
            self.nonfinite += int(counts[-1])
            counts[0] = counts[-1] = 0
            filled = counts.nonzero().flatten()
            for index, count in zip(filled.tolist(), counts[filled].tolist(), strict=True):
                self.counts[index + _BINS_FROM] += count

    def merge(self, other: Exponents) -> None:
        """Take in what another one has seen."""
        self.elements += other.elements
        self.nonfinite += other.nonfinite
        self.zeros += other.zeros
        self.abs_max = larger(self.abs_max, other.abs_max)
        self.counts.update(other.counts)

    def histogram(self) -> ExponentHistogram:
        """What was seen so far."""
        counts = dict(sorted(self.counts.items()))
        return ExponentHistogram(self.elements, self.zeros, self.nonfinite, self.abs_max, counts)


@dataclass(frozen=True)
class ScaleAdvice:
    """The static loss scale that some FP32 gradients ask for, and why; None where there is none.

    `lost_without` and `lost_with` are the shares of the nonzero gradient elements, of weights and
    activations together, that are under 2**-24 unscaled and at that scale.
    """

    scale: float | None
    reason: str
    lost_without: float | None
    lost_with: float | None


def recommend_scale(gradients: Sequence[Exponents], loss: float) -> ScaleAdvice:
    """The largest power of two that keeps every gradient under FP16's largest number, 65504, with
    head room, and the scaled loss inside FP32; at least 1, for a smaller scale loses more than it
    saves."""
    every = Exponents()
    for part in gradients:
        every.merge(part)
    found = every.histogram()
    largest, lost = found.abs_max, found.share_under(TINIEST)
    if not math.isfinite(largest):
        return ScaleAdvice(None, f"the largest FP32 gradient is {largest}", lost, None)
    if largest == 0:
        return ScaleAdvice(None, "every gradient is zero", lost, None)

    def fits(power: int) -> bool:
        room = _FP32_LARGEST / max(abs(loss), 1.0)
        return largest * HEAD_ROOM * 2.0**power < _LARGEST and 2.0**power <= room

    power = next((p for p in range(127, -1, -1) if fits(p)), 0)
    reason = (
        f"the largest FP32 gradient is {largest:.3g}: times 2**{power} and a head room of "
        f"{HEAD_ROOM:g} it stays under {_LARGEST:g}"
    )
    if not fits(power):
        reason = (
            f"the largest FP32 gradient is {largest:.3g}, which leaves FP16 no head room "
            "even without a scale"
        )
    elif largest * HEAD_ROOM * 2.0 ** (power + 1) < _LARGEST:
        reason += "; a larger scale would take the scaled loss out of FP32's range"
    return ScaleAdvice(2.0**power, reason, lost, found.share_under(TINIEST, 2.0**power))


def log2(scale: float) -> int:
    """The exponent of a loss scale. Raises UsageError unless it is a power of two, at least 1: any
    other would round every gradient, and one under 1 loses what a loss scale is there to keep."""
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or exponent < 1:
        raise UsageError(
            f"a loss scale of {scale} is not a power of two of 1 or more",
            mend="Use 65536 for FP16, and 1 for none.",
        )
    return exponent - 1
