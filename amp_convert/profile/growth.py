"""What trials of rounding have shown of one node; see `rounding_trials` for how."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from amp_convert.core.tensor_errors import larger


@dataclass(frozen=True)
class Growth:
    """What rounding does around one node. Errors are in units of the low dtype's roundoff.

    `inputs` is the relative L2 error of the node's result when everything that it reads is rounded;
    `result` that of a later node, the `reader`, when this node's result is. `output` is the error
    of the worst channel of an output, relative to its spread, when this node's result is rounded.
    `choices` is the share of what a later node, the `chooser`, chooses, or what this one does, that
    changes; only where the choice decides what is computed. `lost` is the share of the increments
    that a sum adds to a running value without any effect. All are 0 where nothing was tried, and
    below `rounding_trials.NOTABLE` only `inputs` is measured.

    `channel` is the relative L2 error of the worst channel of a product one of whose weights is so
    small that it loses digits, when everything that it reads is rounded; None of other nodes.
    """

    inputs: float = 0.0
    result: float = 0.0
    reader: str = ""
    output: float = 0.0
    choices: float = 0.0
    chooser: str = ""
    lost: float = 0.0
    channel: float | None = None

    def merged(self, other: Growth) -> Growth:
        """The worse of both; NaN is worse than anything."""
        worst = max(self, other, key=lambda growth: (math.isnan(growth.result), growth.result))
        channels = [g.channel for g in (self, other) if g.channel is not None]
        chooses = max(self, other, key=lambda growth: growth.choices)
        return Growth(
            larger(self.inputs, other.inputs),
            worst.result,
            worst.reader,
            larger(self.output, other.output),
            chooses.choices,
            chooses.chooser,
            larger(self.lost, other.lost),
            functools.reduce(larger, channels) if channels else None,
        )
