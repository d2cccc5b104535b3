"""Guards: measured values that keep a node in FP32 whatever its category says.

Each guard looks at one node that painting would make low, at the calibrated ranges of its output
and of its inputs, and answers with a `Finding` or None. Thresholds come from the rules file's
`[guards]` table. A range that holds NaN or infinity is never within a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from amp_convert.profile import Range
from amp_convert.rules import Guards


@dataclass(frozen=True)
class Finding:
    """A guard that fired: its name, the sentence for the plan and the measured value as text."""

    guard: str
    reason: str
    evidence: str


@dataclass(frozen=True)
class Measured:
    """What calibration knows of one node. `activations` are its outputs and computed inputs,
    `weights` the parameters and buffers that it would read in low precision, by name."""

    activations: Sequence[tuple[str, Range]]
    weights: Sequence[tuple[str, Range]]
    batches: int


Guard = Callable[[Measured, Guards, torch.dtype], Finding | None]


def activation_range(measured: Measured, guards: Guards, dtype: torch.dtype) -> Finding | None:
    """Calibrated absolute maximum times head room must stay under the dtype's largest number."""
    if guards.activation_headroom is False:
        return None
    limit = torch.finfo(dtype).max
    for name, seen in measured.activations:
        if not seen.abs_max * guards.activation_headroom <= limit:
            return Finding(
                "activation-range",
                f"{name} comes too near to the largest {_name(dtype)} number, "
                f"{limit:.5g} (head room {guards.activation_headroom:g})",
                f"abs max {seen.abs_max:.5g} in {_batches(measured.batches)}",
            )
    return None


def weight_range(measured: Measured, guards: Guards, dtype: torch.dtype) -> Finding | None:
    """A weight's absolute maximum times head room must stay under the dtype's largest number."""
    if guards.weight_headroom is False:
        return None
    limit = torch.finfo(dtype).max
    for name, seen in measured.weights:
        if not seen.abs_max * guards.weight_headroom <= limit:
            return Finding(
                "weight-range",
                f"weight {name} does not fit {_name(dtype)}, whose largest number is {limit:.5g}",
                f"abs max {seen.abs_max:.5g}",
            )
    return None


def weight_tiny(measured: Measured, guards: Guards, dtype: torch.dtype) -> Finding | None:
    """The share of a weight's nonzero values that turn subnormal or zero must stay bounded.

    Only FP16 has this trap: BF16 has FP32's exponents.
    """
    if guards.weight_tiny_share is False or dtype != torch.float16:
        return None
    for name, seen in measured.weights:
        if seen.tiny_share is not None and not seen.tiny_share <= guards.weight_tiny_share:
            return Finding(
                "weight-tiny",
                f"most of weight {name} is under 6.1e-05, where float16 loses digits",
                f"{seen.tiny_share:.1%} of its nonzero values",
            )
    return None


ALL: tuple[Guard, ...] = (activation_range, weight_range, weight_tiny)


def first_finding(measured: Measured, guards: Guards, dtype: torch.dtype) -> Finding | None:
    """What the first guard that fires has to say, or None when the node may be low."""
    for guard in ALL:
        finding = guard(measured, guards, dtype)
        if finding is not None:
            return finding
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _batches(count: int) -> str:
    return f"{count} batch" if count == 1 else f"{count} batches"
