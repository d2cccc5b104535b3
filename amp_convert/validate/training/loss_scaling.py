"""How the loss of a low-precision arm is scaled: dynamic, static or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from amp_convert.core.errors import UsageError
from amp_convert.core.exponent_histogram import log2


@dataclass(frozen=True)
class LossScaling:
    """How the loss of a low-precision arm is scaled, as `torch.amp.GradScaler` does it.

    A dynamic scale starts at `initial`, a power of two; it is multiplied by `growth_factor` after
    `growth_interval` steps with finite gradients, and by `backoff_factor` after one without, whose
    update is left out. A static scale stays. Raises UsageError for numbers that make no such rule.
    """

    kind: Literal["dynamic", "static", "none"] = "dynamic"
    initial: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        log2(self.initial)
        if not (math.isfinite(self.growth_factor) and self.growth_factor > 1):
            what = f"the loss scale's growth factor is {self.growth_factor:g}"
            raise UsageError(what, mend="Give a finite number above 1.")
        if not 0 < self.backoff_factor < 1:
            what = f"the loss scale's back-off factor is {self.backoff_factor:g}"
            raise UsageError(what, mend="Give a number between 0 and 1.")

    def scaler(self, device: str) -> torch.amp.GradScaler:
        """A new scaler that starts at `initial`."""
        return torch.amp.GradScaler(
            device,
            init_scale=self.initial,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
            enabled=self.kind != "none",
        )

    def __str__(self) -> str:
        if self.kind != "dynamic":
            return "none" if self.kind == "none" else f"static, {self.initial:g}"
        return (
            f"dynamic, from {self.initial:g}: times {self.growth_factor:g} after "
            f"{self.growth_interval} clean steps, times {self.backoff_factor:g} after an overflow"
        )
