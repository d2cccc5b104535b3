"""`Tuned`: which layers stay FP32, so that the error is within a tolerance at the least cost. Plain
data.

An error is the relative L2 error against FP32 of the worst output, over the batches that were
measured on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Cost(StrEnum):
    """What a price rests on."""

    MEASURED = "measured"
    """Milliseconds on this device, each layer timed in FP32 and frozen, and a cast by its bytes."""
    MODEL = "model"
    """Shares of the model's multiply-adds and bytes: where the device has no fast kernels."""


@dataclass(frozen=True)
class Unit:
    """Layers that share a choice. `nodes` are those that a rule keeps in FP32, by identity; `error`
    is what they add to the outputs' error while low, `price` what FP32 costs more, without casts:
    milliseconds, or a share of the model (see `Cost`); `macs` are their multiply-adds."""

    name: str
    nodes: tuple[str, ...]
    error: float
    price: float
    macs: int


@dataclass(frozen=True)
class Border:
    """A unit that reads another's results. A cast is needed where one of the two is FP32: it costs
    `price`, and where the `source` is the one in FP32 it adds `error` to the outputs' error: the
    value is rounded on its way, as it would be by a source that is low."""

    source: str
    reader: str
    price: float
    error: float


@dataclass(frozen=True)
class Goals:
    """What a plan has to reach. `tolerance` is of the error; a `metric` may lose `max_drop` in its
    own unit against FP32; the frozen model is `speed` times as fast as FP32. None for no goal."""

    tolerance: float | None = None
    metric: str = ""
    max_drop: float | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Point:
    """One plan: the units that it keeps in FP32, what was predicted and what was measured.
    `price` is what FP32 costs in it, as predicted, casts included; `speedup` is FP32's time over
    the frozen model's, side by side; `metrics` are the user's."""

    units: tuple[str, ...]
    predicted: float
    price: float
    error: float
    speedup: float
    share_macs_low: float
    metrics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Tuned:
    """What tuning found. `chosen` is the plan, `reached` whether it meets the goals; `given` is
    that of the user's rules, `lowest` that with nothing kept in FP32 for loss of precision,
    `fp32_metrics` are FP32's. `frontier` has the measured plans that no other beats in error and in
    speed (in price, where prices are not measured), from the smallest error. `trials` counts the
    plans that were measured until the goals were reached."""

    goals: Goals
    cost: Cost
    reached: bool
    chosen: Point
    given: Point
    lowest: Point
    units: tuple[Unit, ...]
    fp32_metrics: tuple[tuple[str, float], ...]
    frontier: tuple[Point, ...]
    trials: int

    def unit(self, name: str) -> Unit:
        """The unit of a name."""
        return next(unit for unit in self.units if unit.name == name)
