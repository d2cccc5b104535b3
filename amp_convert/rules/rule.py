"""The words of a rules file, and one rule: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from amp_convert.core.mode import Mode


class Category(StrEnum):
    """What a rule says about an op; each `Painting` gives the four words their exact effect."""

    ALLOW = "allow"
    INFER = "infer"
    DENY = "deny"
    CLEAR = "clear"


class Painting(StrEnum):
    """How categories become precisions.

    GRAPPLER colours the graph as TensorFlow does: *allow* seeds the low-precision region, *deny*
    stays FP32 and floods forward, *infer* and *clear* join their neighbours. AUTOCAST judges each
    node alone, as PyTorch does: *allow* casts FP32 inputs low, *deny* low ones to FP32, *infer* all
    to the widest float dtype among them, *clear* leaves them.
    """

    GRAPPLER = "grappler"
    AUTOCAST = "autocast"


class Target(StrEnum):
    """What a rule's pattern is compared with."""

    OP = "op"
    LAYER = "layer"
    MODULE = "module"
    NODE = "node"


Limit = float | Literal[False]
"""A guard's limit; False switches the guard off."""


@dataclass(frozen=True)
class GuardLimits:
    """Limits on measured values, the `[guards]` table.

    activation_headroom: the calibrated absolute maximum times this must stay under the largest
    finite value of the low dtype. probe_headroom: the same for the largest finite value on inputs
    unlike those of calibration (see `range_probes`). weight_headroom: the same for a weight. The
    next four concern FP16 alone. activation_floor: a value must somewhere be as large as this.
    weight_tiny_share: above this share (0 to 1) of nonzero values that would become subnormal or
    zero, a weight stays FP32. smallest_constant, smallest_eps: a constant, or one that keeps a
    denominator from zero, must be as large as this.

    The next four bound a rounding, as the largest magnitude times the dtype's unit roundoff.
    position_error: of an integer position, in steps. angle_error: of an angle, in radians.
    logit_error: of the input of a softmax or an exponential. cancellation_error: of what a
    difference reads, relative to its result. exp_growth is the largest exponent in a sum of
    exponentials, and so the factor by which its relative rounding error grows. rounding_growth
    bounds what trials measure: the relative L2 error of a result when what it reads is rounded, in
    units of the dtype's roundoff. output_error: likewise, the error of an output's worst channel,
    relative to its spread, when a result is rounded. choice_error: the root of the share of choices
    that rounding changes, of those that decide what is computed (of a router), in units of the
    roundoff: a changed choice is an error as large as the value, and the root of their share the
    relative L2 error of all. increment_loss: the share of the increments that a running value may
    be added without any effect. cumulative_length and reduction_depth bound the elements that one
    result depends on.
    """

    activation_headroom: Limit = 2.0
    probe_headroom: Limit = 1.0
    activation_floor: Limit = 2.0**-14
    weight_headroom: Limit = 1.0
    weight_tiny_share: Limit = 0.5
    smallest_constant: Limit = 2.0**-14
    smallest_eps: Limit = 2.0**-14
    position_error: Limit = 1.0
    angle_error: Limit = 0.01
    logit_error: Limit = 0.25
    cancellation_error: Limit = 0.05
    exp_growth: Limit = 16.0
    rounding_growth: Limit = 20.0
    output_error: Limit = 24.0
    choice_error: Limit = 40.0
    increment_loss: Limit = 0.5
    cumulative_length: Limit = 64.0
    reduction_depth: Limit = 131072.0


LOSS_LIMITS = (
    *("weight_tiny_share", "position_error", "angle_error", "logit_error", "cancellation_error"),
    *("rounding_growth", "output_error", "increment_loss"),
)
"""The limits of guards that are about loss of precision, which shows in the outputs' error. The
others are about the range, or about choices, which no error of an output tells of."""


@dataclass(frozen=True)
class Rewrites:
    """Changes beyond casts that a plan may ask for, the `[rewrites]` table.

    clamp_masks: what a softmax reads as a mask is raised to half of the low dtype's lowest number,
    where its exponential is zero all the same; -inf stays -inf. scale_scores: attention scores that
    are too large are scaled by a power of two before the product, instead of after it.
    rescale_layers: a layer whose result is too large is scaled by a power of two that the next
    layers take back.
    """

    clamp_masks: bool = False
    scale_scores: bool = False
    rescale_layers: bool = False


@dataclass(frozen=True)
class MadeFor:
    """What a plan that was saved as rules was made for, the `[made_for]` table: the low dtype, the
    device type, and the nodes, by identity, that it does more to than casting: those whose mask is
    `clamped`, and those that are `rescaled`. Planning does not read it; who applies a saved plan to
    a running model does."""

    dtype: str
    device: str
    clamped: frozenset[str] = frozenset()
    rescaled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """One `[[rule]]`, or one operator of one with `ops`. `dtype`, `device` and `mode` ("eval" or
    "train") of None mean any; `source` is "file.toml:line", `preset` says whether that file is one
    of ours, and `rank` is the file's place in the order of all files of a run. `location` is the
    line of the user's code that a node comes from, in a saved plan; planning does not read it."""

    target: Target
    pattern: str
    category: Category
    reason: str
    dtype: str | None
    device: str | None
    mode: Mode | None
    source: str
    preset: bool = False
    rank: int = 0
    location: str = ""

    @property
    def name(self) -> str:
        """Short form for reports, such as "op aten.linear"."""
        return f"{self.target} {self.pattern}"
