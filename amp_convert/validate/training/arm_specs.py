"""The arms of a paired training run: one entry an arm, from which all else about it follows.

To add one, add an entry: it is trained, judged for how chaotic training is if it is `noise`, and
shown in every report.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArmSpec:
    """What one arm trains, and how it is shown.

    `name` is its key in reports, `title` what errors call it, `line` its line in charts. It trains
    the eager model unless it is `converted`, under native `torch.autocast` where it says so, from
    weights that were each moved to a neighbouring FP32 number where they are `nudged`. An arm that
    computes in `low` precision has the loss scale. Where it `may_fail`, the run goes on without it.
    """

    name: str
    title: str
    converted: bool = False
    autocast: bool = False
    nudged: bool = False
    low: bool = False
    may_fail: bool = False
    charted: bool = True


FP32 = ArmSpec("fp32", "FP32")
"""The eager model, with TF32 off. It goes first, so that a step that it fails is said before any
mixed one."""
MIXED = ArmSpec("mixed", "mixed", converted=True, low=True)
AUTOCAST = ArmSpec("autocast", "autocast", autocast=True, low=True, may_fail=True)
"""The eager model under native `torch.autocast`, loss included, as PyTorch advises. It bans or
breaks some models: a result, and no error."""
NOISE = ArmSpec("noise", "FP32", nudged=True, charted=False)
"""FP32 from weights nudged by one unit in the last place, up or down by a coin. How far it parts
from FP32 says how chaotic the training is. Charts show it as a band."""

PAIR = (FP32, MIXED)
ARMS = (*PAIR, AUTOCAST, NOISE)
"""All, in the order in which they train and are shown."""
