"""What a guard sees: one node that painting would make low, and what calibration knows around it.

Everything here is plain data, so a guard is a function of numbers and names, and can be tested as
one. Two neighbourhoods are named: `feeds` are the nodes that read the value as it is (through
operators without numeric effect), `reaches` the sines and exponentials that it gets to through
sums, products and such, which pass a rounding error on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from amp_convert.core.op_facts import OpFacts, facts_of
from amp_convert.profile.calibrate import Range
from amp_convert.profile.growth import Growth
from amp_convert.rules.rule_set import GuardLimits


@dataclass(frozen=True)
class GuardFinding:
    """A guard that fired: its name, the sentence for the plan, the measured value as text and as a
    number, and the limit that it passes, in the same unit."""

    guard: str
    reason: str
    evidence: str
    measured: float
    limit: float


@dataclass(frozen=True)
class Operand:
    """An FP32 value that the node would read in low precision.

    `argument` is its name in the operator's schema; `weight` the name of a parameter, buffer or
    constant, "" for an activation; `eps` the smallest value that a constant added to it, or a
    clamp, leaves it. As a `mask`, its large negative values are to be clamped.
    """

    argument: str
    range: Range | None
    shape: tuple[int, ...] = ()
    weight: str = ""
    eps: float | None = None
    mask: bool = False


@dataclass(frozen=True)
class Consumer:
    """A node that reads the value: its operator, as which argument, the range of what it reads,
    that of its own result, whether its result feeds a sum, and whether the value is scaled by
    products on its way."""

    op: str
    argument: str
    operand: Range | None = None
    result: Range | None = None
    summed: bool = False
    scaled: bool = False

    @property
    def facts(self) -> OpFacts:
        """What is known of its operator."""
        return facts_of(self.op)

    @property
    def is_singular(self) -> bool:
        """Whether it reads the value where a zero gives infinity."""
        return bool(self.argument) and self.facts.singular == self.argument


@dataclass(frozen=True)
class Site:
    """One node. `scalars` are its number arguments by schema name, `axes` the `dim` argument if it
    has one, `batches` what ranges and `growth` rest on. The result of a `masked` node may be
    clamped, as a mask."""

    op: str
    result: Range | None = None
    shape: tuple[int, ...] = ()
    operands: Sequence[Operand] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    axes: tuple[int, ...] = ()
    feeds: Sequence[Consumer] = ()
    reaches: Sequence[Consumer] = ()
    batches: int = 1
    masked: bool = False
    growth: Growth | None = None

    @property
    def facts(self) -> OpFacts:
        """What is known of its operator."""
        return facts_of(self.op)

    @property
    def activations(self) -> list[Operand]:
        return [operand for operand in self.operands if not operand.weight]

    @property
    def weights(self) -> list[Operand]:
        return [operand for operand in self.operands if operand.weight]

    def measured(self, seen: Range) -> str:
        """The evidence that a range is."""
        return seen.text(self.batches)


class Guard(Protocol):
    """A reason, with a limit in the rules file, why a node may not be low."""

    name: str

    def find(self, site: Site, limits: GuardLimits, dtype: torch.dtype) -> GuardFinding | None:
        """What keeps the node in FP32, if `dtype` is the low dtype; None when nothing does."""
        ...
