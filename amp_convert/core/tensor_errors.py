"""How far is one tensor from another? Streaming, in FP64, in bounded memory.

Tensors are compared in chunks that fit a processor cache, and a chunk leaves three dot products and
a few maxima behind. With reference r, value m and d = m - r, the sums of d², r² and r·d give
relative L2 = ‖d‖ / ‖r‖, SQNR in dB = -20 log10(relative L2), and the cosine (r² + r·d) / (‖r‖ ‖r +
d‖).

Non-finite values: where both are the same infinity the difference is 0. Where the reference is NaN
there is nothing to compare with; the element is counted and left out. Any other non-finite value
makes every measure non-finite, which no tolerance admits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

CHUNK = 1 << 17
"""Elements a chunk: 1 MiB in FP64."""


@dataclass
class ErrorSums:
    """What is kept of all elements compared so far."""

    elements: int = 0
    difference: float = 0.0
    reference: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    ref_abs_max: float = 0.0
    nonfinite: int = 0
    ref_nonfinite: int = 0
    overflow: int = 0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Take in two real floating point tensors of one shape."""
        self.elements += reference.numel()
        # One buffer for all chunks: fresh memory for each would cost more than the arithmetic.
        size = min(CHUNK, reference.numel())
        buffers = torch.empty(2, size, dtype=torch.float64, device=reference.device)
        for want, have in chunks(reference, value):
            wide, delta = buffers[:, : want.numel()]
            self._add_chunk(wide.copy_(want), have, delta.copy_(have).sub_(wide))

    def add_incomparable(self, elements: int) -> None:
        """Take in elements that have nothing of the same shape to be compared with."""
        self.elements += elements
        self.difference = self.max_abs = math.nan

    def _add_chunk(self, want: torch.Tensor, have: torch.Tensor, delta: torch.Tensor) -> None:
        """`want` and `delta` are in FP64."""
        difference, reference = float(torch.dot(delta, delta)), float(torch.dot(want, want))
        if not (math.isfinite(difference) and math.isfinite(reference)):
            want, delta = self._comparable(want, have, delta)
            difference, reference = float(torch.dot(delta, delta)), float(torch.dot(want, want))
        if want.numel():
            self.difference += difference
            self.reference += reference
            self.product += float(torch.dot(want, delta))
            self.max_abs = larger(self.max_abs, _abs_max(delta))
            self.ref_abs_max = larger(self.ref_abs_max, _abs_max(want))

    def _comparable(
        self, want: torch.Tensor, have: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the non-finite elements; return reference and difference without equal infinities
        and without those whose reference is NaN."""
        finite = torch.isfinite(want)
        self.ref_nonfinite += int((~finite).sum())
        self.nonfinite += int((finite & ~torch.isfinite(have)).sum())
        self.overflow += int((finite & torch.isinf(have)).sum())
        keep = ~(torch.isnan(want) | (~finite & (want == have)))
        return want[keep], delta[keep]

    @property
    def rel_l2(self) -> float:
        """Relative L2 error; infinite for an error against a reference of zeros."""
        return _ratio(math.sqrt(self.difference), math.sqrt(self.reference))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise ratio; infinite without any error."""
        relative = self.rel_l2
        return math.inf if relative == 0 else -20 * math.log10(relative)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 for two zero tensors, 0 for one."""
        if math.isnan(self.difference) or math.isinf(self.difference):
            return math.nan
        value = self.reference + 2 * self.product + self.difference
        if self.reference <= 0 or value <= 0:
            return 1.0 if self.reference == self.difference == 0 else 0.0
        return (self.reference + self.product) / math.sqrt(self.reference) / math.sqrt(value)

    @property
    def overflow_fraction(self) -> float:
        """Share of elements that are infinite where the reference is finite."""
        return self.overflow / self.elements if self.elements else 0.0


@dataclass
class RoundingSums:
    """What one operator does to correct inputs: error, ULP distance and underflow of its result."""

    dtype: torch.dtype
    errors: ErrorSums = field(default_factory=ErrorSums)
    max_ulp: float = 0.0
    underflow: int = 0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Take in an FP32 reference and the operator's result."""
        self.errors.add(reference, value)
        # On bit patterns: comparing FP16 numbers as such takes several times as long.
        for want, have in chunks(reference, value):
            rounded, bits = _bits(want.to(self.dtype)), _bits(have.to(self.dtype))
            magnitude = bits & 0x7FFF
            if int(torch.count_nonzero(magnitude)) < bits.numel():
                self.underflow += int(((magnitude == 0) & (want != 0)).sum())
            if torch.equal(rounded, bits):
                continue
            distance = _ordered(bits).to(torch.int32).sub_(_ordered(rounded)).abs_()
            if self.errors.ref_nonfinite:
                distance[~torch.isfinite(want)] = 0
            self.max_ulp = max(self.max_ulp, float(distance.max()))
        if self.errors.nonfinite:
            self.max_ulp = math.nan

    @property
    def underflow_fraction(self) -> float:
        """Share of elements that are zero where the reference is not."""
        return self.underflow / self.errors.elements if self.errors.elements else 0.0


@dataclass
class Quantiles:
    """Quantiles of absolute errors, from a histogram over the upper 16 bits of their FP32 patterns.

    The bins are 2⁻⁷ wide relative to their value, so a quantile is right to within 0.8 %.
    """

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(1 << 15, dtype=torch.int64))

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Take in two real floating point tensors of one shape."""
        for want, have in chunks(reference, value):
            error = (have.double() - want.double()).abs().float().nan_to_num(nan=math.inf)
            bins = error.view(torch.int32) >> 16
            self.counts += torch.bincount(bins, minlength=1 << 15).cpu()

    def at(self, share: float) -> float:
        """The smallest bin edge that `share` of all errors do not exceed; NaN without any."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        if int(self.counts[0]) >= share * total:
            return 0.0
        index = int(torch.searchsorted(self.counts.cumsum(0), math.ceil(share * total)))
        edge = torch.tensor([min(index + 1, 0x7F80) << 16], dtype=torch.int32)
        return float(edge.view(torch.float32))


def chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors flattened, a chunk at a time; nothing for empty ones."""
    a, b = a.detach(), b.detach()
    if a.stride() == b.stride() and not a.is_contiguous():
        a, b = _dense(a), _dense(b)
    flat = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return ((want, have) for want, have in flat if want.numel())


def larger(a: float, b: float) -> float:
    """The larger of two numbers; NaN if either is one."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in memory order where they fill their memory: a view instead of a copy."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], -shape[d]))
    return tensor.permute(order)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The patterns of FP16 or BF16 numbers, as int16."""
    return tensor.view(torch.int16)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Such patterns as int16 whose distance is the number of representable steps between.

    Sign and magnitude become two's complement: (m ^ s) - s with s = -1 for a negative number.
    """
    sign = bits >> 15
    return (bits & 0x7FFF).bitwise_xor_(sign).sub_(sign)


def _abs_max(tensor: torch.Tensor) -> float:
    # In FP64 two passes are faster than `aminmax`. NaN comes through both.
    return larger(-float(torch.amin(tensor)), float(torch.amax(tensor)))


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else numerator if math.isnan(numerator) else math.inf
    return numerator / denominator
